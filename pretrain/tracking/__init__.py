"""Recording a run while it trains: record files, terminal display, TensorBoard, Weights & Biases."""
