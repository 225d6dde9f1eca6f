"""Measurements of speed and memory: `python -m benchmarks --help`. Not part of the package."""
