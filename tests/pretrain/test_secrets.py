"""A password in the address of a source is in nothing that a whole job writes or shows."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import wandb
import zstandard

from pretrain.config.loading import load
from pretrain.runs.jsonl import read_events
from pretrain.tracking.loggers import WandbLogger

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py

SECRETS = ("hunter2", "t0k3n-literal", "fromtheenvironment", "evalpassword", "an0ther")


@pytest.fixture
def vault() -> Iterator[fsspec.AbstractFileSystem]:
    memory = fsspec.filesystem("memory")
    yield memory
    memory.store.clear()


def contents(folder: Path) -> Iterator[bytes]:
    """The bytes of every file below the folder, unpacked, and all their names."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)).encode()
        if path.is_file():
            raw = path.read_bytes()
            yield raw
            if path.suffix == ".zst":
                yield zstandard.ZstdDecompressor().decompressobj().decompress(raw)
            if path.suffix == ".gz":
                yield gzip.decompress(raw)


def holds(folder: Path, args: str) -> bool:
    return any(args.encode() in content for content in contents(folder))


def test_a_job_from_text_to_report_tells_no_secret(
    pretrain: Pretrain,
    vault: fsspec.AbstractFileSystem,
    tiny_text: Path,
    tiny_args: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [path.read_text() for path in sorted(tiny_text.iterdir())]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:150]).encode()
    for password in ("hunter2", "an0ther"):
        vault.pipe(f"/alice:{password}@corpus/a.jsonl?token=t0k3n-literal", lines)
    vault.pipe("/bob:fromtheenvironment@other/long.txt", "".join(texts[150:]).encode())
    vault.pipe(
        "/eve:evalpassword@eval/e.txt", b"one two three four five six seven eight nine ten eleven twelve thirteen"
    )
    monkeypatch.setenv("PASSWORD_OF_BOB", "fromtheenvironment")
    said: list[str] = []

    def run(*args: object, code: int = 0) -> str:
        answer = pretrain(*args)
        said.append(answer.out + answer.err)
        assert answer.code == code, said[-1]
        return answer.out + answer.err

    def sources(password: str) -> list[str]:
        first = {
            "kind": "jsonl",
            "name": "a",
            "paths": [f"memory://alice:{password}@corpus/a.jsonl?token=t0k3n-literal"],
        }
        second = {"kind": "text", "name": "b", "paths": ["memory://bob:${PASSWORD_OF_BOB}@other"]}
        return [
            f"data.sources={json.dumps([first, second])}",
            "data.decontaminate.paths=[memory://eve:evalpassword@eval/e.txt]",
        ]

    data, runs = tmp_path / "data", tmp_path / "runs"
    more = [f"data.path={data}", "data.vocab_size=300", "data.workers=1", "data.filters.apply=[length]"]
    more += ["data.filters.length.min_characters=60"]
    run("data", "prepare", "--keep-rejects", *sources("hunter2"), *more)
    assert "is prepared already, with these very settings" in run("data", "prepare", *sources("an0ther"), *more)
    args = tiny_args(runs / "1", *more, "train.steps=6", "checkpoint.every=3", "eval.every=6")
    run("train", *args, *sources("hunter2"))
    assert "is finished: all 6 steps are done" in run("train", *args, *sources("an0ther"))
    assert [event.kind for event in read_events(runs / "1" / "events.jsonl")] == ["start", "save", "save", "finish"]
    run("report", runs / "1")
    run("data", "inspect", data, runs / "1" / "config.yaml", "--html", tmp_path / "data.html")
    run("data", "inspect", data)
    run("data", "verify", data)
    run("config", "show", *sources("hunter2"))
    other = f"data.path={tmp_path / 'other'}"
    run("data", "prepare", "data.sources=[{kind: text, paths: ['memory://eve:evalpassword@nowhere']}]", other, code=2)
    run("data", "prepare", runs / "1" / "config.yaml", other, code=2)
    assert "memory://***:***@corpus/a.jsonl?token=*** was written without its secret" in said[-1]
    run("train", "data.sources=[memory://eve:evalpassword@x]", code=2)

    for secret in SECRETS:
        assert not any(secret in text for text in said), secret
        assert not holds(tmp_path, secret), secret
    assert holds(data / "rejects", '"reason"')  # it looks into .zst
    for written in ("1/config.yaml", "1/checkpoints/step-00000006/manifest.json", "1/report.html"):
        text = (runs / written).read_text()
        assert "memory://***:***@corpus/a.jsonl?token=***" in text, written
        assert "memory://***:${PASSWORD_OF_BOB}@other" in text, written
    (tmp_path / "planted.gz").write_bytes(gzip.compress(b"... hunter2 ..."))
    assert holds(tmp_path, "hunter2")


def test_weights_and_biases_is_told_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: dict[str, Any] = {}

    def init(**given: object) -> SimpleNamespace:
        reported.update(given)
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setattr(wandb, "init", init)
    args = [f"run.dir={tmp_path}", "data.sources=[{kind: text, paths: ['s3://key:hunter2@b/x']}]"]
    WandbLogger(load(None, args).config, tmp_path, "offline")
    assert reported["config"]["data"]["sources"][0]["paths"] == ["s3://***:***@b/x"]


def test_the_arguments_of_the_command_line_are_kept_without_secrets(pretrain: Pretrain) -> None:
    answer = pretrain("config", "show", "data.sources=[{kind: text, paths: ['s3://key:hunter2@b/x']}]")
    assert 'data.sources: [{"name": null, "kind": "text", "paths": ["s3://***:***@b/x"]' in answer.out
    assert sys.argv[3] == "data.sources=[{kind: text, paths: ['s3://***:***@b/x']}]"


def test_a_traceback_tells_no_secret(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a bug at s3://key:hunter2@b/x")

    monkeypatch.setattr("pretrain.config.loading.load_args", fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as caught:
        pretrain("config", "show")
    sys.excepthook(caught.type, caught.value, caught.tb)
    shown = capsys.readouterr().err
    assert shown.endswith("RuntimeError: a bug at s3://***:***@b/x\n")
    assert "Traceback (most recent call last):" in shown
