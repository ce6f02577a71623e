"""What the performance claims rest on: `python -m benchmarks.NAME [--json FILE]` from the root of the repository."""
