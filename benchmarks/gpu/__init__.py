"""`make gpu-check`: checks a machine with a GPU.

Each stage is a module and a program of its own; `__main__` runs them in order.
"""
