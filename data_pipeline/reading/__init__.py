"""Shards to batches: a pure function of the settings and the sample number."""
