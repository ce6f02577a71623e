"""Checkpoints: save, load, verify, retain. Knows tensors by name and files on a disk, and not what a model is.

A run's `checkpoints/` holds one folder a checkpoint:

    step-00001000/
        __0_0.distcp    the tensors of rank 0 (torch.distributed.checkpoint); __1_0.distcp those of rank 1, ...
        .metadata       where in which file each tensor lies; a pickle
        manifest.json   size and xxh3 checksum of every file, and the record of the run: `record.Manifest`
    step-00002000.tmp-1a2b3c4d/    being written, or left behind by a crash; never read

`store` writes and reads tensors, `directory` finds and deletes checkpoints, `record` is the manifest, `rng` the random state,
`ranks` how several processes agree.

torch.distributed.checkpoint alone accepts a flipped bit, a zeroed page, files of two saves mixed, more layers than the model has, and
another dtype. The manifest and the strict comparison in `store.load` notice these.

`.metadata` is a pickle, so that a checkpoint from a stranger is a program: load only checkpoints whose maker you trust. Checksums guard
against broken disks and interrupted writes; they are no signature.
"""
