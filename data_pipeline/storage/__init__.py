"""Token shards on disk: what they are, their checksums, and the manifest that makes them a data set."""
