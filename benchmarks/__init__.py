"""Benchmarks: one file a noun, rows committed in results/. Run by `make bench` and `make bench-gpu`."""
