"""Text -> tokens -> shards -> batches. Knows files and tokens, but no model, no training loop, no torch."""
