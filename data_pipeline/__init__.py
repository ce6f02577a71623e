"""Text -> tokens -> shards -> batches. Knows files and tokens, but no model and no training loop. Does not import
torch."""
