"""Calls to many processes at once."""
