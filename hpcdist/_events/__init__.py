"""What a process says of what it does, and how others than its cluster come to see it."""
