"""Shared fixtures: a tiny prepared data set, arguments of a tiny run on it, and two ways to start that run."""

import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from rich.console import Console
from workers import WorkerPool

from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from pretrain.cli import main
from pretrain.config.loading import load
from pretrain.tracking.loggers import Logger
from pretrain.train.loop import Outcome
from pretrain.train.run import train

WHO = ("the model", "a reader", "the loop", "every rank", "one shard", "the old engine")
DOES = ("reads", "writes", "skips", "remembers", "shuffles", "follows")
WHAT = ("a token", "its batch", "the gradient", "two documents", "the next step", "no data")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread: sums have one order, and other processes keep their cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Seed the global generator before each test, so that a test does not depend on those before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    """`workers.run(function, 4, ...)` runs it on 4 ranks of a gloo group. Processes start when first needed."""
    with WorkerPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 300 documents of 2 to 8 simple sentences, the same on every machine."""
    folder, random = tmp_path_factory.mktemp("text"), Random(0)
    for number in range(300):
        sentences = (
            f"{random.choice(WHO)} {random.choice(DOES)} {random.choice(WHAT)}.\n" for _ in range(random.randint(2, 8))
        )
        (folder / f"{number:03d}.txt").write_text("".join(sentences))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text, prepared with a vocabulary of 300 tokens. Read-only."""
    path = tmp_path_factory.mktemp("prepared") / "data"
    source = SourceConfig(kind="text", paths=(str(tiny_text),))
    prepare(
        path,
        PrepareConfig(
            sources=(source,),
            vocab_size=300,
            tokenizer_sample_mb=1,
            validation_fraction=0.1,
            shard_tokens=4000,
            workers=1,
        ),
    )
    return path


@pytest.fixture(scope="session")
def tiny_args(tiny_data: Path) -> Callable[..., list[str]]:
    """`tiny_args(run_dir, "train.steps=40", ...)`: arguments of `pretrain train`, 2 layers; later ones win."""

    def args(run_dir: Path, *more: str) -> list[str]:
        return [
            f"run.dir={run_dir}",
            f"data.path={tiny_data}",
            "data.seq_len=32",
            *(
                "model.n_layers=2",
                "model.d_model=32",
                "model.n_heads=2",
                "model.n_kv_heads=1",
                "model.d_ff=64",
                "model.max_seq_len=64",
            ),
            *("optim.lr=0.01", "optim.warmup=4"),
            *(
                "train.steps=40",
                "train.batch_size=4",
                "train.device=cpu",
                "train.precision=fp32",
                "train.compile=false",
            ),
            *("eval.every=10", "eval.batches=2", "checkpoint.every=20"),
            *more,
        ]

    return args


@pytest.fixture(scope="session")
def run_tiny(tiny_args: Callable[..., list[str]]) -> Callable[..., Outcome]:
    """`run_tiny(run_dir, "train.steps=40", ..., observers=[...])`: such a run, started without the command line."""

    def run(run_dir: Path, *more: str, observers: Sequence[Logger] = (), console: Console | None = None) -> Outcome:
        return train(load(None, tiny_args(run_dir, *more)).config, console or Console(file=io.StringIO()), observers)

    return run


@dataclass(frozen=True)
class Answer:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`pretrain("train", "train.steps=1")`: the real entry point, in this process. Lines are not wrapped."""

    def run(*args: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "400")
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            code = end.code
        else:
            code = 0
        assert isinstance(code, int)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


def file_hashes(folder: Path) -> dict[str, str]:
    """Every name below a folder, with the hash of what a file holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(pretrain: Callable[..., Answer], tmp_path: Path, tiny_data: Path) -> Callable[..., str]:
    """`refused("train", "train.steps=x")`: the one line on stderr, if everything else is as it must be."""

    def run(*args: object) -> str:
        before = [file_hashes(tmp_path), file_hashes(tiny_data)]
        answer = pretrain(*args)
        assert answer.code == 2
        assert "\n" not in answer.err.removesuffix("\n")
        assert answer.err.startswith("error: ")
        assert "Traceback" not in answer.out + answer.err
        assert [file_hashes(tmp_path), file_hashes(tiny_data)] == before
        return answer.err

    return run
