"""Shards to batches, as a pure function of the settings and the sample number."""
