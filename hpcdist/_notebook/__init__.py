"""hpcdist in notebooks: magics, prints under the cell that caused them, cells that are stopped."""
