"""Measures our code beside its alternatives, on the same work. Results: bench/results; page: docs/speed.md."""
