"""The keeper's process, and the way to it. It imports little: each module delays every world."""
