"""The training program: `run` is the whole story; then the loop, its batches, resuming, signals."""
