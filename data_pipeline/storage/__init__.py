"""Token shards on disk: their format, their checksums, and the manifest of a split."""
