"""kill -9 at any moment of a save leaves the previous checkpoint or the new one, complete.

One helper process imports torch once and forks a child for each moment. A child gets SIGKILL before its n-th file
system operation (Python's audit hooks see all of them). Or the kernel kills it while it writes a file, at an exact
byte: a limit on the file size sends a signal that ends the process as abruptly. No moment depends on time.
"""

import shutil
import subprocess
import sys

import pytest
import torch

from pretrain.checkpoint.directory import latest_valid
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import TrainState
from pretrain.checkpoint.prune import prune
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.verify import verify_checkpoint

HELPER = """
import os, pathlib, resource, signal, sys
import torch
from pretrain.checkpoint.manifest import TrainState
from pretrain.checkpoint.save import save_checkpoint

torch.set_num_threads(1)  # a fork does not take OpenMP's threads along: a child that needs them waits for ever
root, elements = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def train_state(step):
    return TrainState(step=step, samples=step, config={}, dataset="", order="", layout={"data": 1}, rng={})

def state(step, size):
    return {"model": {"weight": torch.full((size,), float(step))}}

def die_before(count):
    left = [count]
    def hook(event, arguments):
        operations = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")
        if event in operations and str(root) in str(arguments[0]):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
    sys.addaudithook(hook)

def child(folder, size, prepare):
    save_checkpoint(folder, state(1, size), train_state(1))
    pid = os.fork()
    if pid == 0:
        prepare()
        save_checkpoint(folder, state(2, size), train_state(2))
        os._exit(0)
    return pid

for count in range(100):
    pid = child(root / f"operation-{count:02d}", 1000, lambda: die_before(count))
    if os.waitpid(pid, 0)[1] == 0:
        break

def die_at_byte(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

for part in range(8):
    limit = elements * 4 * part // 8 + 1
    pid = child(root / f"byte-{part}", elements, lambda: die_at_byte(limit))
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGXFSZ
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", HELPER, str(root), "1000000"], check=True, timeout=240)
    yield root
    shutil.rmtree(root)


def latest_valid_step(directory):
    def fail(path, problems):
        raise AssertionError(f"{path} looks committed and is not whole: {problems}")

    path = latest_valid(directory, fail)
    assert path is not None
    step = int(path.name.removeprefix("step-"))
    elements = 1000 if directory.name.startswith("operation") else 1_000_000
    state = {"model": {"weight": torch.zeros(elements)}}
    load_checkpoint(path, state)
    assert torch.equal(state["model"]["weight"], torch.full((elements,), float(step)))
    return step


def test_a_save_killed_before_any_of_its_operations_leaves_the_old_or_the_new_checkpoint_valid(killed):
    steps = [latest_valid_step(directory) for directory in sorted(killed.glob("operation-*"))]
    assert len(steps) >= 9  # mkdir, shard, metadata twice and its rename, manifest, folder sync, commit, two more syncs
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps[-1] == 2


def test_a_save_killed_in_the_middle_of_a_file_leaves_the_old_checkpoint_valid(killed):
    for part in range(8):
        directory = killed / f"byte-{part}"
        assert latest_valid_step(directory) == 1
        assert [file.stat().st_size for file in directory.glob("*.tmp-*/*.distcp")] == [1_000_000 * 4 * part // 8 + 1]


def test_after_a_crash_the_same_step_is_saved_again_and_the_remains_go(killed):
    directory = next(
        directory for directory in sorted(killed.glob("operation-*"), reverse=True) if list(directory.glob("*.tmp-*"))
    )
    remains = next(directory.glob("*.tmp-*"))
    assert verify_checkpoint(remains) == []  # the last moment before the commit: all was written
    record = TrainState(step=2, samples=2, config={}, dataset="", order="", layout={"data": 1}, rng={})
    path = save_checkpoint(directory, {"model": {"weight": torch.full((1000,), 2.0)}}, record)
    prune(directory, keep=2)
    assert sorted(entry.name for entry in directory.iterdir()) == ["step-00000001", path.name]
