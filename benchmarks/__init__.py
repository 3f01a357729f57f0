"""The performance benchmarks: `make bench`, or `python -m benchmarks --help`."""
