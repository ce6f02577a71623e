"""A checkpoint of another run, by the name that users give it: RUN (its newest checkpoint), RUN@STEP, or its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from data_pipeline.tokenizing.tokenizer import load_tokenizer
from pretrain.checkpoint import directory
from pretrain.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from pretrain.config import Ancestor, RunConfig
from pretrain.config.loading import validate
from pretrain.config.resume import AncestorMode
from pretrain.config.saved import CONFIG_FILE, split_init_from
from pretrain.errors import UserError


@dataclass(frozen=True)
class NamedCheckpoint:
    """The checkpoint, and where it comes from."""

    run: Path
    """As the user names it: a run directory, or the checkpoint itself."""
    path: Path
    """The checkpoint."""
    manifest: Manifest
    config: RunConfig
    """Settings of its run when it was saved."""

    @property
    def run_dir(self) -> Path | None:
        """Its run directory; None for a checkpoint folder outside of one, such as a copy."""
        checkpoints = self.path.absolute().parent
        lies_in_run = checkpoints.name == "checkpoints" and (checkpoints.parent / CONFIG_FILE).is_file()
        return checkpoints.parent if lies_in_run else None

    @property
    def name(self) -> str:
        """`RUN@STEP`, as in the settings."""
        return str(self.run) if self.run == self.path else f"{self.run}@{self.manifest.step}"

    def as_ancestor(self, mode: AncestorMode) -> Ancestor:
        """The entry for `run.ancestry` of a run that begins from this checkpoint."""
        content = json.dumps(self.manifest.config, sort_keys=True).encode()
        return Ancestor(
            run=str((self.run_dir or self.path).resolve()),
            step=self.manifest.step,
            samples=self.manifest.samples,
            mode=mode,
            generation=self.manifest.generation,
            config=xxhash.xxh3_128_hexdigest(content),
        )

    @property
    def tokenizer_paths(self) -> list[Path]:
        """Where its tokenizer may be, the likeliest place first."""
        kept = [] if self.run_dir is None else [self.run_dir / "tokenizer.json"]
        return [*kept, Path(self.config.data.tokenizer)]

    @cached_property
    def tokenizer_files(self) -> dict[str, Path]:
        """{fingerprint: file} of the tokenizers that are there."""
        files: dict[str, Path] = {}
        for file in self.tokenizer_paths:
            if file.exists():
                files.setdefault(load_tokenizer(file).fingerprint, file)
        return files


def find_checkpoint(text: str, named: str) -> NamedCheckpoint:
    """Return the checkpoint that `text` names. Reads only its manifest.

    Args:
        text: RUN, RUN@STEP, or the folder of a checkpoint.
        named: how messages call it, such as `run.init_from=runs/my`.

    Raises:
        UserError: it does not exist, or its settings cannot be read.
    """
    run, step = split_init_from(text)
    path = run if (run / MANIFEST).is_file() else _checkpoint_in_run(run, step, named)
    manifest = read_manifest(path)
    if step not in (None, manifest.step):
        raise UserError(f"{named}: the checkpoint in {run} is that of step {manifest.step}; leave @{step} out")
    try:
        return NamedCheckpoint(run, path, manifest, validate(manifest.config))
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: its settings cannot be read by this version: {error}") from error


def _checkpoint_in_run(run: Path, step: int | None, named: str) -> Path:
    """Return the path of the checkpoint of `step` in a run directory; None is the latest."""
    kept = directory.committed_steps(run / "checkpoints")
    if not kept:
        raise UserError(
            f"{named}: {run} holds no checkpoint; name a run directory that does, or the folder of one checkpoint"
        )
    if step is not None and step not in kept:
        shown = ", ".join(str(other) for other in sorted(kept))
        raise UserError(
            f"{named}: there is no checkpoint of step {step}; kept are {shown} (checkpoint.keep says how many a run "
            "keeps)"
        )
    path = directory.checkpoint_path(run / "checkpoints", kept[0] if step is None else step)
    directory.check_name(path)
    return path
