"""The data pipeline beside its peers: `python -m benchmarks.data`. Each case runs in a process of its own."""
