"""One module an engine: each is an `Engine` of `parallel.engine`, and the loop cannot tell which it has."""
