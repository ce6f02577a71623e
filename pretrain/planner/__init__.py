"""What a run will hold, move, take and cost, from its settings alone. Arithmetic: imports no torch."""
