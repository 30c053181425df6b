"""What many processes do together: trees, loops, values that all have, spmd."""
