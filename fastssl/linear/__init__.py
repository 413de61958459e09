"""Linear probes: the protocols of the papers, the head, and what trains it."""
