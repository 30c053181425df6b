"""Other people's interfaces, on our workers."""
