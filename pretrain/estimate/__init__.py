"""Parameters, memory, activations, communication and FLOPs of any layout, from the settings alone. Imports no torch."""
