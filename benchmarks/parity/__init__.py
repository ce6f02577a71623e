"""Parity: every layout must train like one process.

`python -m benchmarks.parity` runs all cases and writes docs/parity.md.
"""
