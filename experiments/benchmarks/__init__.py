"""Timings of this package, each a command: ``python -m experiments.benchmarks.<name>``."""
