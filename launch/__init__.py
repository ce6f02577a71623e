"""Start processes on this machine, under torchrun, or under Slurm. Knows no torch model.

Empty so far: one process needs no launcher, and torchrun starts several.
"""
