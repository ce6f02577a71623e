"""`pretrain layout` describes any number of processes from one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py

ARGS = ("model.preset=llama3-8b", "data.seq_len=8192", "train.batch_size=128")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without data."""
    monkeypatch.chdir(tmp_path)


def test_memory_and_communication_of_64_ranks(pretrain: Pretrain, tmp_path: Path) -> None:
    answer = pretrain("layout", *ARGS, "parallel.tensor=4", "parallel.pipeline=4", "--world-size", 64)
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    axes = "pipeline=4 (outermost) x replicate=1 x shard=4 x context=1 x tensor=4 (innermost); zero=2"
    assert f"8.03B parameters on 64 ranks, 8 nodes of 8: {axes}" in lines
    assert "parallel.shard = 4 (what parallel.pipeline=4 x parallel.tensor=4 = 16 leaves of 64 processes)" in lines
    assert [line.split()[:4] for line in lines if line.startswith(("0 ", "3 "))] == [
        ["0", "0", "embedding,", "0-7"],
        ["3", "3", "26-31,", "head"],
    ]
    moved = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("pipeline ", "fsdp ", "tensor "))}
    assert moved["tensor"][:3] == ["yes", "all-gather", "4"]
    assert moved["fsdp"][:3] == ["no", "all-gather", "4"]
    assert moved["pipeline"][:3] == ["no", "send", "4"]
    assert "ranks wait" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_one_rank_and_its_peers(pretrain: Pretrain) -> None:
    answer = pretrain("layout", *ARGS, "parallel.tensor=4", "parallel.pipeline=4", "--world-size=64", "--rank=21")
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    assert "Rank 21 reads part 1 of 4 of each batch" in lines
    assert "pipeline 1 of 4 5, 21, 37, 53" in lines
    assert "shard 1 of 4 17, 21, 25, 29" in lines
    assert "tensor 1 of 4 20, 21, 22, 23" in lines
    assert "context 0 of 1" in lines


def test_a_node_may_have_other_sizes(pretrain: Pretrain) -> None:
    args = ("layout", *ARGS, "parallel.tensor=4", "--world-size=16", "--ranks-per-node")
    assert "tensor yes" in " ".join(pretrain(*args, 4).out.split())
    assert "tensor no" in " ".join(pretrain(*args, 2).out.split())


def test_the_vocabulary_size_must_be_known(pretrain: Pretrain, tiny_data: Path) -> None:
    answer = pretrain("layout", "model.preset=125m", "--world-size=8")
    assert answer.code == 2
    message = "model.vocab_size=auto is the tokenizer's size, and data.path=data/default holds no prepared data: set "
    assert f"{message}model.vocab_size" in answer.err
    assert pretrain("layout", "model.preset=125m", f"data.path={tiny_data}", "--world-size=8").code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("parallel.tensor=16", "--world-size=16"),
            "parallel.tensor=16 does not divide model.n_kv_heads=8: use 1, 2, 4 or 8, or let",
        ),
        (("--world-size=8", "--rank=8"), "--rank=8 is not one of the ranks of --world-size=8: use 0 to 7"),
    ],
    ids=str,
)
def test_an_impossible_layout_is_one_line(pretrain: Pretrain, args: tuple[str, ...], message: str) -> None:
    answer = pretrain("layout", *ARGS, *args)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert message in answer.err
