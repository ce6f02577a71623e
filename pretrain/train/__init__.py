"""The training program. Read `run` first; then the loop, its batches, resuming, messages."""
