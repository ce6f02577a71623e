"""The check of a GPU machine, `make gpu-check`: one stage a module, each a program of its own. `__main__` runs them in order."""
