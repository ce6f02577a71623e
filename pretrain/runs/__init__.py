"""A run directory and the records in it: their schema, their files, throughput."""
