"""One package for each engine. Each implements `Engine` of `parallel.engine`; the loop cannot tell them apart."""
