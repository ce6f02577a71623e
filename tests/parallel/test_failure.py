"""When one rank fails, every rank ends with its exit code, and the error is printed once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore, all_reduce
from workers import PROCESSES

import parallel.failure
import parallel.world
from data_pipeline.errors import DataError
from parallel.errors import LayoutError
from parallel.world import World, process_group
from pretrain import cli
from pretrain.errors import Diverged, UserError

SIZE = 3
FOREVER = 3600.0
BOUND = 10.0
"""Seconds from an error to the end of every rank."""

ERRORS = {
    "user": UserError("data.path=nowhere\nis not there"),
    "data": DataError("data.path=nowhere is damaged"),
    "diverged": Diverged("the loss is nan"),
}


COMMANDS = {
    "unknown option": ("train", "--stepz=5"),
    "bad value": ("train", "configs/demo.yaml", "--world-size=many"),
    "missing argument": ("generate",),
    "no words": ("train",),
    "help": ("train", "--help"),
    "usage, alone": ("train", "--stepz=5"),
    "help of each": ("train", "--help"),
}
"""What the real command line is given, on every rank."""


def life(how: str, when: Path) -> Callable[[], None]:
    """Replaces the command line: ranks form a group and work until something happens to rank 1."""

    def fail() -> None:
        when.write_text(str(time.monotonic()))
        if how.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise ERRORS.get(how, ValueError("a bug"))

    def app(**_: object) -> None:
        world = World.from_environment()
        if how in ("bad layout", "alone"):
            raise LayoutError("parallel.tensor=3 does not divide model.n_heads=8")
        if how == "user" and world.rank == 1:
            fail()  # before the group exists, for which the others wait
        with process_group(world, "cpu"):
            for _ in range(4):
                all_reduce(torch.ones(1))
            if how not in ("well", "stopped"):
                if world.rank == 1:
                    fail()
                if how.endswith("busy"):
                    time.sleep(FOREVER)
                all_reduce(torch.ones(1))
        if how == "stopped":
            sys.exit(75)

    return app


def live(rank: int, port: int, how: str, folder: Path) -> None:
    """One rank under the real entry point, as torchrun would have started it, with its output in a file."""
    output = os.open(folder / f"{rank}.out", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if how in COMMANDS:
        sys.argv = ["pretrain", *COMMANDS[how]]
    else:
        cli.app = life(how, folder / "when")
    if how in ("alone", "usage, alone"):
        cli.fail_together = lambda world, show: nullcontext()
    if "nobody looks" in how:
        parallel.failure._LocalPeer.is_alive = property(lambda _: True)
    if how == "help of each":
        World.is_main = property(lambda _: True)
    cli.main()


@dataclass(frozen=True)
class End:
    """Exit codes by rank, everything they printed, and the seconds from the error to the end of the last one."""

    codes: list[int | None]
    output: str
    seconds: float


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., End]:
    """Three ranks of the real entry point; the store is here, as it would be in torchrun."""

    def run(how: str, patience: float = 60.0) -> End:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        ranks = [PROCESSES.Process(target=live, args=(rank, store.port, how, tmp_path)) for rank in range(SIZE)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + patience
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        ended = time.monotonic()
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        output = "".join((tmp_path / f"{rank}.out").read_text() for rank in range(SIZE))
        when = tmp_path / "when"
        return End(codes, output, ended - float(when.read_text()) if when.exists() else 0.0)

    return run


@pytest.mark.parametrize("how", ["bug", "busy"])
def test_a_rank_that_raises_ends_the_others_within_10_seconds_and_is_heard_once(
    run_ranks: Callable[..., End], how: str
) -> None:
    end = run_ranks(how)
    assert end.codes == [1, 1, 1]
    assert end.output.count("Traceback") == end.output.count("ValueError: a bug\non rank 1 of 3") == 1
    assert "disappeared" not in end.output
    assert 0 < end.seconds < BOUND


@pytest.mark.parametrize(
    ("how", "line", "code"),
    [
        ("user", "error: data.path=nowhere is not there (on rank 1 of 3, ", 2),
        ("data", "error: data.path=nowhere is damaged (on rank 1 of 3, ", 2),
        ("diverged", "error: the loss is nan (on rank 1 of 3, ", 1),
        ("bad layout", "error: parallel.tensor=3 does not divide model.n_heads=8 (on rank ", 2),
    ],
    ids=["before the group", "in the group", "diverged", "the same on all"],
)
def test_an_expected_error_is_one_line_of_one_rank(
    run_ranks: Callable[..., End], how: str, line: str, code: int
) -> None:
    end = run_ranks(how)
    assert end.codes == [code] * SIZE
    assert end.output.startswith(line)
    assert end.output.count("\n") == 1
    assert end.seconds < BOUND


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("unknown option", "error: No such option: --stepz"),
        ("bad value", "error: Invalid value for '--world-size': "),
        ("missing argument", "error: Missing argument 'RUN'; see pretrain generate --help (on rank "),
    ],
)
def test_a_command_line_that_cannot_be_is_one_line_of_one_rank(
    run_ranks: Callable[..., End], how: str, line: str
) -> None:
    end = run_ranks(how)
    assert end.codes == [2] * SIZE
    assert end.output.startswith(line)
    assert f"; see pretrain {COMMANDS[how][0]} --help (on rank " in end.output
    assert end.output.count("\n") == 1


@pytest.mark.parametrize(("how", "code", "times"), [("help", 0, 1), ("no words", 2, 1), ("help of each", 0, SIZE)])
def test_help_is_shown_by_the_main_rank_alone(run_ranks: Callable[..., End], how: str, code: int, times: int) -> None:
    """With a negative control: where every rank takes itself for the main one."""
    end = run_ranks(how)
    assert end.codes == [code] * SIZE
    assert end.output.count("Usage: pretrain train") == end.output.count("Settings, given as key=value") == times


@pytest.mark.parametrize("how", ["killed", "killed, others busy"])
def test_a_killed_rank_is_named_once_and_the_others_end(run_ranks: Callable[..., End], how: str) -> None:
    """Whether its peers see a connection close, as on gloo, or hang, as in NCCL's collectives."""
    end = run_ranks(how)
    assert end.codes == [1, -signal.SIGKILL, 1]
    assert end.output.count("rank 1 disappeared: it was killed, or its machine went down\n") == 1
    assert 0 < end.seconds < BOUND


def test_without_a_neighbour_that_looks_others_that_hang_stay(run_ranks: Callable[..., End]) -> None:
    """Negative control."""
    assert run_ranks("killed, nobody looks, others busy", patience=BOUND / 2).codes == [None, -signal.SIGKILL, None]


@pytest.mark.parametrize(("how", "code"), [("well", 0), ("stopped", 75)])
def test_ranks_that_end_well_say_nothing(run_ranks: Callable[..., End], how: str, code: int) -> None:
    assert run_ranks(how) == End([code] * SIZE, "", 0.0)


@pytest.mark.parametrize(
    ("how", "line"), [("alone", "error: parallel.tensor=3"), ("usage, alone", "error: No such option: --stepz")]
)
def test_ranks_that_do_not_fail_together_each_show_the_error(
    run_ranks: Callable[..., End], how: str, line: str
) -> None:
    """Negative control."""
    assert run_ranks(how).output.count(line) == SIZE


def test_under_torchrun_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path[:] = {json.dumps(sys.path)}\n"
        "from pretrain import cli; from test_failure import life\n"
        f"cli.app = life('bug', Path({str(tmp_path / 'when')!r}))\n"
        "cli.main()\n"
    )
    words = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={SIZE}", str(script))
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ended.returncode == 1
    assert (ended.stdout + ended.stderr).count("ValueError: a bug\non rank 1 of 3") == 1
    assert time.monotonic() - float((tmp_path / "when").read_text()) < BOUND + 5  # torchrun's own end included
