"""What workers are doing and what they print."""
