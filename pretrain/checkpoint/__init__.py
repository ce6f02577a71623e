"""Checkpoints: save, load, verify, prune. This package knows named tensors and files, not what a model is.

The `checkpoints/` folder of a run holds one folder per checkpoint:

    step-00001000/
        __0_0.distcp    tensors of rank 0 (torch.distributed.checkpoint); rank 1 writes __1_0.distcp, and so on
        .metadata       file and offset of each tensor; a pickle
        manifest.json   size and XXH3 checksum of every file, and the state of the run: `manifest.Manifest`
    step-00002000.tmp-1a2b3c4d/    being written, or left behind by a crash; never read

Modules: `save` and `load` move tensors, `manifest` reads and writes manifest.json, `verify` compares files with it,
`streaming` reads and makes tensors one at a time, `directory` finds checkpoints, `prune` deletes old ones, `rng`
captures random states, `object_collectives` lets the ranks agree.

torch.distributed.checkpoint alone accepts a flipped bit, a zeroed page, files of two different saves, more layers than
the model has, and another dtype. The manifest and the comparison in `load` catch these.

`.metadata` is a pickle, so loading a checkpoint can execute code: load only checkpoints from people you trust. The
checksums detect broken disks and interrupted writes; they are not a signature.
"""
