"""From settings to what is decided before training: `auto` values, the layout, memory checks, the engine."""
