"""How many images a second, and compared with what; results are in benchmarks/results/."""
