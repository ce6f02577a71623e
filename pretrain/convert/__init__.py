"""Checkpoints of one model made into checkpoints of another: a dense one into a mixture of experts (`upcycle`), a
multi-head one into one with grouped queries (`gqa`).

A conversion maps the names of the new model's tensors to `LazyTensor`s over the tensors of the old one. `write_run`
makes and writes them one at a time, into a run directory that `run.init_from` and `pretrain generate` take.
"""
