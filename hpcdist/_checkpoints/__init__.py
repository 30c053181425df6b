"""The results of a map on disk: the file's format, whose it is, writing and reading it."""
