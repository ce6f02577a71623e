"""kill -9 at any moment of a save leaves the previous checkpoint or the new one, whole.

One helper process imports torch once and forks a child for each moment, which is killed by SIGKILL: before its n-th operation on the
file system (seen by Python's audit hooks, so no moment is chosen by hand), and at times spread over the writing of a larger state.
"""

import shutil
import subprocess
import sys

import pytest
import torch

from pretrain.checkpoint.directory import newest, retain
from pretrain.checkpoint.record import Record, verify
from pretrain.checkpoint.store import load, save

HELPER = """
import os, pathlib, signal, sys, time
import torch
from pretrain.checkpoint.record import Record
from pretrain.checkpoint.store import save

root, elements = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def record(step):
    return Record(step=step, samples=step, config={}, dataset="", layout={"data": 1}, rng={})

def state(step, size):
    return {"model": {"weight": torch.full((size,), float(step))}}

def die_before(count):
    left = [count]
    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir") and str(root) in str(arguments[0]):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
    sys.addaudithook(hook)

def child(folder, size, prepare):
    save(folder, state(1, size), record(1))
    pid = os.fork()
    if pid == 0:
        prepare()
        save(folder, state(2, size), record(2))
        os._exit(0)
    return pid

for count in range(100):
    pid = child(root / f"operation-{count:02d}", 1000, lambda: die_before(count))
    if os.waitpid(pid, 0)[1] == 0:
        break

begin = time.perf_counter()
save(root / "timing", state(1, elements), record(1))
duration = time.perf_counter() - begin
for part in range(8):
    pid = child(root / f"time-{part}", elements, lambda: None)
    time.sleep(duration * (part + 0.5) / 8)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", HELPER, str(root), "4000000"], check=True, timeout=240)
    yield root
    shutil.rmtree(root)


def step_of_newest(directory):
    def fail(path, problems):
        raise AssertionError(f"{path} looks committed and is not whole: {problems}")

    path = newest(directory, fail)
    assert path is not None
    step = int(path.name.removeprefix("step-"))
    elements = 1000 if directory.name.startswith("operation") else 4_000_000
    state = {"model": {"weight": torch.zeros(elements)}}
    load(path, state)
    assert torch.equal(state["model"]["weight"], torch.full((elements,), float(step)))
    return step


def test_a_save_killed_before_any_of_its_operations_leaves_the_old_or_the_new_checkpoint_whole(killed):
    steps = [step_of_newest(directory) for directory in sorted(killed.glob("operation-*"))]
    assert len(steps) >= 9  # mkdir, shard, metadata twice and its rename, manifest, folder sync, commit, two more syncs
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps[-1] == 2


def test_a_save_killed_while_it_writes_leaves_the_old_or_the_new_checkpoint_whole(killed):
    assert {step_of_newest(directory) for directory in killed.glob("time-*")} <= {1, 2}
    assert any(list(directory.glob("*.tmp-*/*.distcp")) for directory in killed.glob("time-*"))  # some died in the middle


def test_after_a_crash_the_same_step_is_saved_again_and_the_remains_go(killed):
    directory = next(directory for directory in sorted(killed.glob("operation-*"), reverse=True) if list(directory.glob("*.tmp-*")))
    remains = next(directory.glob("*.tmp-*"))
    assert verify(remains) == []  # the last moment before the commit: all was written
    record = Record(step=2, samples=2, config={}, dataset="", layout={"data": 1}, rng={})
    path = save(directory, {"model": {"weight": torch.full((1000,), 2.0)}}, record)
    retain(directory, keep=2)
    assert sorted(entry.name for entry in directory.iterdir()) == ["step-00000001", path.name]
