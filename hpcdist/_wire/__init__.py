"""What travels: frames, pickled values, functions by id, and the first words on a link."""
