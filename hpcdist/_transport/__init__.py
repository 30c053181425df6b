"""How it travels: MPI within a world, links between worlds, one wait loop over both."""
