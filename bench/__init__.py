"""Measures our code side by side with its alternatives, on the same work. Results: bench/results. Page: docs/speed.md."""
