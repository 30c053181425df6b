"""What a cluster manager is: the contract, and what it sees of a launch and its worlds."""
