"""Functions as jobs of a batch scheduler, with no driver that has to stay."""
