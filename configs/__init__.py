"""YAML presets, as a package so that they are installed beside the code. Each holds only differences from the defaults."""
