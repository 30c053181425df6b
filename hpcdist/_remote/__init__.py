"""Calls, futures and channels: what users say to other processes."""
