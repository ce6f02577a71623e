"""Pipeline parallelism: stages, schedules, tied embeddings, the split backward pass of zero bubble."""
