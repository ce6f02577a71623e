"""YAML presets: differences from the defaults. A package, so that they are installed with the code."""
