"""The HTML pages of runs and of data sets. Reads a run only through `pretrain.runs`."""
