"""Helpers for tests of interrupted and failing preparations: a text, and preparing it in this process or as a
command."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipeline.prepare import PrepareStage, StageProgress, StageProgressCallback, prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.prepared import PreparedData

PATIENCE = 60.0
"""Timeout in seconds for something that takes one second."""

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def write_jsonl(file: Path, documents: int, seed: int = 0) -> None:
    """Documents of 60 to 120 words; one in ten is short, one in ten nearly repeats the previous one."""
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    for i in range(documents):
        words = ["".join(rng.choice(SYLLABLES, 3)) for _ in range(int(rng.integers(60, 120)))]
        if i % 10 == 1:
            words = words[:3]
        elif i % 10 == 2:
            words = [*json.loads(lines[-2])["text"].split(), "more"]
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    file.write_text("".join(lines))


SETTINGS: dict[str, Any] = {
    "vocab_size": 300,
    "tokenizer_sample_mb": 0.1,
    "validation_fraction": 0.1,
    "shard_tokens": 2000,
    "filters": {"apply": ["length"], "length": {"min_characters": 40}},
    "dedup": {"exact": True, "minhash": True},
}


@dataclass(frozen=True)
class Text:
    """A source, and the result of preparing it without interruption."""

    jsonl: Path
    chunks: int
    prepared: dict[str, bytes]


def write_text(folder: Path, documents: int) -> Text:
    write_jsonl(folder / "words.jsonl", documents)
    prepare_here(folder / "data", folder / "words.jsonl")
    files = contents(folder / "data")
    return Text(
        folder / "words.jsonl",
        len({name[:17] for name in files if name.endswith(".bin") and name.startswith("train/")}),
        files,
    )


def prepare_here(
    path: Path,
    jsonl: Path,
    progress: StageProgressCallback = lambda _: None,
    *,
    keep_rejects: bool = False,
    **settings: Any,
) -> PreparedData:
    """Prepare in this process, without workers: the result does not depend on them."""
    source = SourceConfig(kind="jsonl", paths=(str(jsonl),))
    config = PrepareConfig(**(SETTINGS | {"sources": (source,), "workers": 1} | settings))
    return prepare(path, config, keep_rejects=keep_rejects, progress=progress)


@contextlib.contextmanager
def preparing(path: Path, jsonl: Path, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """Run `pretrain data prepare` with two workers, in its own process group."""
    sources = [{"kind": "jsonl", "paths": [str(jsonl)]}]
    config = path.parent / "prepare.yaml"
    config.write_text(
        yaml.safe_dump({"data": SETTINGS | {"path": str(path), "sources": sources, "workers": 2} | settings})
    )
    command = [sys.executable, "-c", "from pretrain.cli import main; main()", "data", "prepare", str(config)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Background jobs of a shell ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return (exit code, the lines of both streams joined to one)."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, " ".join((out + err).split())


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finished(path: Path, pass_: str = "done") -> list[str]:
    """Return the names of the chunks that a running preparation has finished."""
    ending = {"done": "result", "judged": "verdicts"}[pass_]
    return [file.stem for file in (path / ".prepare.tmp" / pass_).glob(f"*.{ending}")]


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def looks_prepared(path: Path) -> bool:
    return any((path / name).exists() for name in ("train", "validation", "tokenizer.json", "rejects"))


def interrupt(path: Path, jsonl: Path, stage: PrepareStage, **settings: Any) -> None:
    """Start a preparation and stop it in the middle of a stage."""

    def stop(progress: StageProgress) -> None:
        if progress.stage == stage and progress.read > (progress.total or 0) / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_here(path, jsonl, stop, **settings)
