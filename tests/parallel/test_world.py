"""What torchrun's variables say, and the process group that follows from them."""

import resource

import pytest
import torch
from torch.distributed import is_initialized

import parallel.failure
import parallel.world
from parallel.errors import LayoutError
from parallel.world import World, process_group

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_one_process_where_no_launcher_speaks() -> None:
    assert World.from_environment({"MASTER_ADDR": "elsewhere"}) == World(rank=0, size=1, local_rank=0, local_size=1)
    assert World().is_main


def test_torchruns_variables_are_read() -> None:
    world = World.from_environment(TORCHRUN)
    assert world == World(rank=5, size=8, local_rank=1, local_size=4)
    assert not world.is_main


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            r"RANK=0 WORLD_SIZE=2 in .*, without LOCAL_RANK, LOCAL_WORLD_SIZE: start with torchrun",
        ),
        (TORCHRUN | {"LOCAL_RANK": "one"}, r"LOCAL_RANK=one .* are not all numbers: start with torchrun"),
        (TORCHRUN | {"RANK": "8"}, r"RANK=8 WORLD_SIZE=8 .* contradict each other: start with torchrun"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, r"LOCAL_RANK=4 LOCAL_WORLD_SIZE=4 .* contradict each other"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, r"LOCAL_WORLD_SIZE=9 .* contradict each other"),
    ],
    ids=["half", "no number", "rank", "local rank", "local size"],
)
def test_variables_that_cannot_be_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        World.from_environment(variables)


def test_one_process_needs_no_group() -> None:
    with process_group(World(), "cuda"):
        assert not is_initialized()


@pytest.mark.parametrize(
    ("soft", "hard", "after"),
    [(1024, 4096, 3072), (1024, 2048, 2048), (4096, 4096, 4096), (256, resource.RLIM_INFINITY, 3072)],
)
def test_files_may_be_open_for_every_rank(soft: int, hard: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    parallel.world._raise_open_file_limit(3072)
    assert limits[-1] == (after, hard)


def test_more_processes_than_gpus_are_refused_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(LayoutError, match=r"2 processes on a machine with 1 GPUs: start at most 1"),
        process_group(World(1, 2, 1, 2), "cuda"),
    ):
        pass
