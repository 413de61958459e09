"""Measurements: how many images a second, compared with what. Results in benchmarks/results/*.json."""
