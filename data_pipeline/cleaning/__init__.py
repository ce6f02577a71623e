"""Documents to those worth training on: filters, duplicates, evaluation sets; every dropped one has its reason."""
