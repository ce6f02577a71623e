"""A model -> the same model on a set of devices. Knows modules; knows no loop, no data, no model class."""
