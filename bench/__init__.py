"""Our code and what a user would pick instead, on the same work, side by side. Results: bench/results; page: docs/speed.md."""
