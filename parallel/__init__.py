"""Puts a model on a mesh of devices. Knows modules and meshes; knows no training loop, no data and no model class."""
