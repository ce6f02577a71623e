"""The command line: help of every command, and all commands together from text to report."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig, flatten, is_prepare_key, walk
from pretrain.runs.schema import StepRecord, ValidationRecord

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py

COMMANDS = {
    "demo": "Raw text to trained model in minutes",
    "train": "Train a model. The same command with the same run directory resumes",
    "generate": "Continue a text with a trained model",
    "report": "one self-contained page",
    "data": "Turn raw text into token shards",
    "data tokenizer": "Train a tokenizer on `data.sources`",
    "data prepare": "Turn `data.sources` into shards of tokens",
    "data inspect": "Show what a prepared data set holds",
    "data verify": "compare it with its checksums",
    "config": "Show a config, or the schema",
    "config show": "Print every setting with its value and where the value comes from",
    "config schema": "Print the JSON schema of a config file",
}


def join_lines(text: str) -> str:
    """Text without line breaks, with single spaces."""
    return " ".join(text.split())


def test_help_lists_every_command(pretrain: Pretrain) -> None:
    answer = pretrain("--help")
    assert (answer.code, answer.err) == (0, "")
    assert all(command in answer.out for command in ("demo", "train", "generate", "report", "data", "config"))
    assert answer.out == pretrain("-h").out


@pytest.mark.parametrize(("command", "sentence"), COMMANDS.items(), ids=COMMANDS)
def test_each_command_explains_itself(pretrain: Pretrain, command: str, sentence: str) -> None:
    answer = pretrain(*command.split(), "--help")
    assert (answer.code, answer.err) == (0, "")
    assert sentence.replace("`", "") in join_lines(answer.out).replace("`", "")


@pytest.mark.parametrize(
    ("command", "listed"),
    [
        ("train", lambda key: not is_prepare_key(key)),
        ("config show", lambda key: True),
        ("data prepare", lambda key: key.startswith("data.")),
        ("data tokenizer", lambda key: key.startswith("data.")),
        ("convert upcycle", lambda key: key.startswith("model.moe.")),
    ],
    ids=["train", "config show", "data prepare", "data tokenizer", "convert upcycle"],
)
def test_help_lists_every_setting_with_description_and_default(
    pretrain: Pretrain, command: str, listed: Callable[[str], bool]
) -> None:
    help_text = join_lines(pretrain(*command.split(), "--help").out)
    defaults = flatten(RunConfig())
    for key, field in walk():
        default = "auto" if field.default == "auto" else str(defaults[key])  # RunConfig() has resolved some
        row = join_lines(
            f"{key} {default} {field.description}"
            if len(default) <= 34
            else f"{key} {field.description} Default: {default}"
        )
        assert (row in help_text) == listed(key), row


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, pretrain.cli; print(*sorted(sys.modules))"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "pretrain.cli.train" in modules
    assert not modules & {
        "torch",
        "datasets",
        "numpy",
        "pyarrow",
        "pydantic",
        "tokenizers",
        "transformers",
        "plotly",
        "wandb",
        "yaml",
    }


def test_config_show_names_the_origin_of_each_value(pretrain: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: {preset: tiny}\ntrain: {steps: 7}\n")
    answer = pretrain("config", "show", tmp_path / "my.yaml", "optim.lr=1e-3", "log.samples=['[bold]']")
    lines = answer.out.splitlines()
    assert answer.code == 0
    assert len(lines) == len(flatten(RunConfig()))
    assert f"train.steps: 7  # {tmp_path / 'my.yaml'}" in lines
    assert "model.d_model: 64  # preset tiny" in lines
    assert "optim.lr: 0.001  # command line" in lines
    assert 'log.samples: ["[bold]"]  # command line' in lines
    assert "train.batch_size: 32  # default" in lines
    assert "optim.betas: [0.9, 0.95]  # default" in lines


def test_config_schema_is_the_schema(pretrain: Pretrain) -> None:
    assert json.loads(pretrain("config", "schema").out) == RunConfig.model_json_schema()


def test_commands_from_text_to_report(
    pretrain: Pretrain,
    tmp_path: Path,
    tiny_text: Path,
    tiny_args: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = f"data.sources=[{{kind: text, paths: [{tiny_text}]}}]"
    data, run = tmp_path / "data", tmp_path / "run"
    prepare = ("data", "prepare", source, f"data.path={data}", "data.vocab_size=300", "data.validation_fraction=0.1")
    tokenizer = pretrain("data", "tokenizer", *prepare[2:])
    assert tokenizer.code == 0
    assert f"{data / 'tokenizer.json'}: 300 tokens, fingerprint " in tokenizer.out
    prepared = pretrain(*prepare)
    assert prepared.code == 0
    assert "265        0      265  21," in prepared.out  # documents read, dropped, written; tokens
    assert "is prepared already" in pretrain(*prepare).out

    inspected = pretrain("data", "inspect", data, "--samples", "1")
    assert inspected.code == 0
    assert "tokenizer of 300 tokens" in inspected.out
    assert "<|endoftext|>" in inspected.out
    verified = pretrain("data", "verify", data)
    assert verified.code == 0
    assert f"{data}: 2 shards, 0.1 MB, all as their manifests say" in verified.out

    args = tiny_args(
        run, f"data.path={data}", "train.steps=12", "checkpoint.every=6", "train.compile=auto", "log.samples=[the loop]"
    )
    stop_at(monkeypatch, 4)
    stopped = pretrain("train", *args)
    assert stopped.code == 75
    assert "SIGTERM received; the same command resumes from here" in stopped.out
    assert "train.compile = False (" in stopped.out
    stop_at(monkeypatch, None)
    trained = pretrain("train", *args)
    assert trained.code == 0
    assert "step 4 of 12, from the latest checkpoint" in trained.out
    assert f"report: {run / 'report.html'}" in trained.out
    assert stopped.err == trained.err == ""
    assert "is finished: all 12 steps are done" in pretrain("train", *args).out

    again = [pretrain("generate", run, "the loop", "--max-new-tokens", "9", "--seed", "3") for _ in range(2)]
    assert again[0].code == 0
    assert again[0].out.splitlines()[0] == str(run / "checkpoints" / "step-00000012")
    assert again[0].out.splitlines()[1].startswith("the loop")
    assert again[0] == again[1]

    (run / "report.html").unlink()
    assert join_lines(pretrain("report", run).out) == str(run / "report.html")
    html = (run / "report.html").read_text()
    assert html.lstrip().lower().startswith("<!doctype html>")
    assert "the loop" in html


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    """Send SIGTERM to the training process after a step; None sends none."""

    class Stop:
        def log(self, record: StepRecord | ValidationRecord) -> None:
            if isinstance(record, StepRecord) and record.step == step:
                signal.raise_signal(signal.SIGTERM)

        def close(self) -> None:
            pass

    monkeypatch.setattr("pretrain.train.run.open_loggers", lambda *_: [Stop()])


def test_generate_names_the_checkpoint_it_skipped(
    pretrain: Pretrain, tmp_path: Path, run_tiny: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.train.run.write_report", lambda _: None)
    run_tiny(tmp_path / "run", "train.steps=6", "checkpoint.every=3")
    shard = tmp_path / "run" / "checkpoints" / "step-00000006" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    answer = pretrain("generate", tmp_path / "run", "the")
    assert answer.code == 0
    assert answer.out.startswith(f"skipped: {shard} has ")
    assert "step-00000003\n" in answer.out


def test_a_misspelt_command_is_exit_code_2(pretrain: Pretrain) -> None:
    answer = pretrain("trian")
    assert answer.code == 2
    assert "No such command 'trian'" in answer.err


def test_a_bug_keeps_its_traceback(pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.config.loading.load_args", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain("config", "show")


def test_an_error_with_line_breaks_and_markup_is_one_line(pretrain: Pretrain) -> None:
    answer = pretrain("train", "a\nb [/red] :smile: [bold].yaml")
    assert answer.code == 2
    assert answer.err.startswith("error: a b [/red] :smile: [bold].yaml: no such file")
    assert answer.err.count("\n") == 1
