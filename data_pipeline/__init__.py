"""Text -> tokens -> shards -> batches. Knows files and tokens; knows no model and no loop, and imports no torch."""
