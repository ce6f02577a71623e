"""One package per engine. Each implements `parallel.engine.Engine`."""
