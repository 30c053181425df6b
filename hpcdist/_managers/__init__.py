"""Where workers come from and how they end."""
