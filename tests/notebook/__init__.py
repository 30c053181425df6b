"""hpcdist in a notebook: cells that are run by a real kernel, and what shows under each."""
