"""The managers there are, and what users call to add and remove workers."""
