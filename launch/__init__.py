"""A command line -> processes: on this machine, under torchrun, under Slurm. Knows no torch model at all.

Empty as long as training is one process: `pretrain train` needs no launcher then.
"""
