"""Documents to token ids, at the speed of the fastest back end that gives the right ones."""
