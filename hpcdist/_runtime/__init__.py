"""This process: who it is, whom it knows, whose call runs, which values it owns."""
