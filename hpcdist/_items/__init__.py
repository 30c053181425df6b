"""What maps and loops share: an item's name, random numbers, duration and bar."""
