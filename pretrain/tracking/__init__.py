"""Everything that is told about a run while it trains: record files, terminal display, TensorBoard, W&B."""
