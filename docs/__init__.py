"""The documentation, and the code that draws and builds it. A package, so that no other `docs` hides it."""
