"""Process 1: who its workers are, and how launches and worlds come and go."""
