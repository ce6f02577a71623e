"""We detect each corruption that torch.distributed.checkpoint silently accepts. That it accepts them is the control."""

import errno
import io
import json
import os
import pickle
import re
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from data_pipeline.errors import StorageError
from pretrain.checkpoint import rng
from pretrain.checkpoint.directory import checkpoint_path, latest_valid, mark_damaged, partial_path, steps_on_disk
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import TrainState, read_manifest
from pretrain.checkpoint.prune import prune
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.verify import unlisted_files, verify_checkpoint
from pretrain.errors import UserError

SHARD = "__0_0.distcp"


def make_state(seed=0, layers=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    names = ["model.embed_tokens.weight"] + [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(layers)]
    model = {name: torch.randn(64, 96, generator=generator).to(dtype) for name in names}
    optimizer = {
        name: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(64, 96, generator=generator)} for name in names
    }
    return {"model": model, "optimizer": optimizer}


def empty_like(state):
    return {
        key: empty_like(value) if isinstance(value, dict) else torch.zeros_like(value) for key, value in state.items()
    }


def equal(a, b):
    return a.keys() == b.keys() and all(
        equal(a[key], b[key]) if isinstance(a[key], dict) else torch.equal(a[key], b[key]) for key in a
    )


def make_train_state(step=1, **changes):
    fields = {
        "step": step,
        "samples": 32 * step,
        "config": {"model": {"n_layers": 2}, "optim": {"lr": 3e-4, "betas": [0.9, 0.95], "max_grad_norm": None}},
        "dataset": "0123456789abcdef",
        "order": "fedcba9876543210",
        "layout": {"data": 1},
        "rng": {"data=0": rng.capture()},
    }
    return TrainState(**fields | changes)


def plain_dcp_load(path, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_load(dict(state), storage_reader=FileSystemReader(path), no_dist=True)


def fail_on_problem(path, problems):
    raise AssertionError(f"{path}: {problems}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_restores_the_saved_values_bitwise_in_place(tmp_path, dtype):
    state = make_state(3, dtype=dtype)
    path = save_checkpoint(tmp_path / "checkpoints", state, make_train_state(1000))
    assert path == tmp_path / "checkpoints" / "step-00001000"
    assert sorted(file.name for file in path.iterdir()) == [".metadata", SHARD, "manifest.json"]
    assert verify_checkpoint(path) == []

    loaded = empty_like(state)
    held = loaded["model"]["model.embed_tokens.weight"]
    load_checkpoint(path, loaded)
    assert equal(loaded, state)
    assert held is loaded["model"]["model.embed_tokens.weight"]
    assert not equal(loaded, make_state(4, dtype=dtype))


def test_tensors_that_are_views_transposed_or_parameters_are_saved_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "model": {
            "view": base[1:3],
            "transposed": base.T,
            "parameter": torch.nn.Parameter(base + 1),
            "scalar": torch.tensor(7.0),
        }
    }
    path = save_checkpoint(tmp_path, state, make_train_state())
    loaded = {
        "model": {
            name: torch.zeros(tensor.shape).requires_grad_(name == "parameter")
            for name, tensor in state["model"].items()
        }
    }
    load_checkpoint(path, loaded)
    assert equal(loaded, state)
    assert (path / SHARD).stat().st_size < 10_000


def test_one_section_can_be_loaded_alone(tmp_path):
    state = make_state(3)
    path = save_checkpoint(tmp_path, state, make_train_state())
    loaded = {"model": empty_like(state["model"])}
    load_checkpoint(path, loaded)
    assert equal(loaded["model"], state["model"])


def test_the_record_comes_back_with_a_generation_of_its_own(tmp_path):
    record = make_train_state(2)
    manifests = [read_manifest(save_checkpoint(tmp_path / name, make_state(), record)) for name in ("a", "b")]
    for manifest in manifests:
        assert {name: getattr(manifest, name) for name in TrainState.model_fields} == {
            name: getattr(record, name) for name in TrainState.model_fields
        }
    assert manifests[0].generation != manifests[1].generation


def test_the_random_state_comes_back(tmp_path):
    path = save_checkpoint(tmp_path, make_state(), make_train_state())
    expected, other = torch.rand(8), torch.rand(8)
    rng.restore(read_manifest(path).rng["data=0"])
    assert torch.equal(torch.rand(8), expected)
    assert not torch.equal(expected, other)


def flip_a_bit(path):
    content = bytearray((path / SHARD).read_bytes())
    content[len(content) // 2] ^= 0x10
    (path / SHARD).write_bytes(content)


def zero_the_middle(path):
    content = bytearray((path / SHARD).read_bytes())
    start = content.index(bytes(make_state(1)["model"]["model.layers.0.mlp.up_proj.weight"].numpy().tobytes()[:64]))
    content[start : start + 4096] = bytes(4096)
    (path / SHARD).write_bytes(content)


def take_the_shard_of_another_step(path):
    shutil.copy(checkpoint_path(path.parent, 2) / SHARD, path / SHARD)


def truncate(path):
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-1])


def lose_the_shard(path):
    (path / SHARD).unlink()


def lose_the_metadata(path):
    (path / ".metadata").unlink()


@pytest.mark.parametrize("corrupt", [flip_a_bit, zero_the_middle, take_the_shard_of_another_step])
def test_dcp_alone_accepts_in_silence(tmp_path, corrupt):
    """Negative control: the damage below is real, and without our checksums it would go into the run."""
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (1, 2)]
    corrupt(paths[0])
    loaded = empty_like(make_state())
    plain_dcp_load(paths[0], loaded)
    assert not equal(loaded, make_state(1))


@pytest.mark.parametrize(
    ("corrupt", "problem"),
    [
        (flip_a_bit, f"{SHARD} is damaged: its checksum is"),
        (zero_the_middle, f"{SHARD} is damaged: its checksum is"),
        (take_the_shard_of_another_step, f"{SHARD} is damaged: its checksum is"),
        (truncate, f"{SHARD} has "),
        (lose_the_shard, f"{SHARD} is missing"),
        (lose_the_metadata, ".metadata is missing"),
    ],
)
def test_verification_names_the_damaged_file(tmp_path, corrupt, problem):
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (1, 2)]
    corrupt(paths[0])
    assert [problem in line for line in verify_checkpoint(paths[0])] == [True]
    assert verify_checkpoint(paths[1]) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace('"samples": 32', '"samples": 33'), "damaged: its own checksum does not match"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[]", "damaged: not a JSON object"),
        (lambda text: "\udcff", "damaged"),
        (None, "has no manifest.json"),
    ],
)
def test_a_damaged_manifest_is_a_problem_and_not_a_traceback(tmp_path, change, problem):
    path = save_checkpoint(tmp_path, make_state(), make_train_state())
    manifest = path / "manifest.json"
    if change:
        manifest.write_text(change(manifest.read_text()), errors="surrogateescape")
    else:
        manifest.unlink()
    assert [problem in line for line in verify_checkpoint(path)] == [True]


def test_metadata_is_not_unpickled_before_its_checksum_was_compared(tmp_path):
    class Program:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = save_checkpoint(tmp_path, make_state(), make_train_state())
    (path / ".metadata").write_bytes(pickle.dumps(Program()))
    with pytest.raises(UserError, match=r"\.metadata has \d+ bytes instead of"):
        load_checkpoint(path, empty_like(make_state()))
    assert not (tmp_path / "executed").exists()
    with pytest.raises(BaseException, match=r"metadata|storage"):  # negative control: DCP runs it
        plain_dcp_load(path, empty_like(make_state()))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            make_state(1, layers=3),
            r"3 tensors only in the checkpoint \(model\.model\.layers\.2\.mlp\.up_proj\.weight, .*, \.\.\.\)",
        ),
        (make_state(1, layers=1), r"3 tensors only in the run \(model\.model\.layers\.1\."),
        (
            make_state(1, dtype=torch.bfloat16),
            r"3 tensors of another shape or dtype \(.* is bfloat16\[64, 96\] in the checkpoint and float32\[64, "
            r"96\] in the run",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_no_tensor(tmp_path, other, difference):
    path = save_checkpoint(tmp_path, other, make_train_state())
    state = empty_like(make_state())
    with pytest.raises(UserError, match=difference) as refusal:
        load_checkpoint(path, state)
    assert "run.dir" in str(refusal.value)
    assert equal(state, empty_like(make_state()))


def test_dcp_alone_accepts_more_layers_and_another_dtype(tmp_path):
    """Negative control of the refusals above."""
    for step, other in enumerate((make_state(1, layers=3), make_state(1, dtype=torch.bfloat16))):
        state = empty_like(make_state())
        plain_dcp_load(save_checkpoint(tmp_path, other, make_train_state(step)), state)
        assert not equal(state, empty_like(make_state()))


def test_a_tied_parameter_under_two_names_is_refused_before_anything_is_written(tmp_path):
    weight = torch.ones(4, 4)
    with pytest.raises(
        ValueError, match=r"model\.model\.embed_tokens\.weight and model\.lm_head\.weight are the same tensor"
    ):
        save_checkpoint(
            tmp_path,
            {"model": {"model.embed_tokens.weight": weight, "lm_head.weight": weight.detach()}},
            make_train_state(),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_state_dict_with_other_values_than_tensors_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.step is a int"):
        save_checkpoint(tmp_path, {"optimizer": {"step": 3}}, make_train_state())


def test_latest_valid_skips_and_reports_damaged_checkpoints(tmp_path):
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (1, 2, 3)]
    partial_path(tmp_path, 9, "dead").mkdir()
    assert latest_valid(tmp_path, fail_on_problem) == paths[2]

    flip_a_bit(paths[2])
    lose_the_metadata(paths[1])
    reported = []
    assert latest_valid(tmp_path, lambda path, problems: reported.append((path, problems))) == paths[0]
    assert [path for path, _ in reported] == [paths[2], paths[1]]
    assert "checksum" in reported[0][1][0]
    assert "missing" in reported[1][1][0]


def test_no_checkpoint_at_all_is_none_and_only_broken_ones_are_an_error_with_a_way_out(tmp_path):
    assert latest_valid(tmp_path / "nowhere", fail_on_problem) is None
    partial_path(tmp_path, 9, "dead").mkdir()
    assert latest_valid(tmp_path, fail_on_problem) is None
    for step in (1, 2):
        lose_the_shard(save_checkpoint(tmp_path, make_state(step), make_train_state(step)))
    with pytest.raises(
        UserError, match=r"none of the 2 checkpoints .*/step-00000002/__0_0\.distcp is missing\. Restore"
    ) as refusal:
        latest_valid(tmp_path, lambda path, problems: None)
    assert "delete" not in str(refusal.value)


def test_a_valid_checkpoint_is_never_replaced(tmp_path):
    path = save_checkpoint(tmp_path, make_state(1), make_train_state())
    with pytest.raises(UserError, match=r"step-00000001 exists already and was kept: another process"):
        save_checkpoint(tmp_path, make_state(2), make_train_state())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = empty_like(make_state())
    load_checkpoint(path, loaded)
    assert equal(loaded, make_state(1))


def test_of_two_racing_writers_the_second_fails_and_the_first_stays(tmp_path, monkeypatch):
    rename, raced = Path.rename, []

    def rename_after_the_other(self, target):
        if ".tmp-" in self.name and not raced:
            raced.append(target)
            save_checkpoint(
                tmp_path, make_state(1), make_train_state()
            )  # the other process commits between our writing and our rename
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_after_the_other)
    with pytest.raises(UserError, match="exists already and was kept"):
        save_checkpoint(tmp_path, make_state(2), make_train_state())
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001"]
    loaded = empty_like(make_state())
    load_checkpoint(latest_valid(tmp_path, fail_on_problem), loaded)
    assert equal(loaded, make_state(1))


def test_a_damaged_checkpoint_of_the_same_step_makes_way(tmp_path):
    """After a roll-back to an older checkpoint the run comes by the damaged one again."""
    flip_a_bit(save_checkpoint(tmp_path, make_state(1), make_train_state()))
    path = save_checkpoint(tmp_path, make_state(1), make_train_state())
    assert verify_checkpoint(path) == []
    assert len(list(tmp_path.iterdir())) == 2
    prune(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [path]


def leave_stray_files(folder):
    """What file managers, NFS and people leave behind. The third name is that of a rank that the save did not have."""
    for name in (".DS_Store", ".nfs0001", "__1_0.distcp"):
        (folder / name).write_bytes(b"left over")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").touch()
    (folder / "dangling").symlink_to("/nowhere")


def test_unlisted_files_are_named_and_ignored(tmp_path):
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (1, 2)]
    assert unlisted_files(paths[1]) == []
    leave_stray_files(paths[1])
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "step-00000003").touch()  # a file, a dangling link and a folder of another name are no checkpoints
    (tmp_path / "step-00000004").symlink_to("/nowhere")
    (tmp_path / "step-00000005 (copy)").mkdir()
    assert verify_checkpoint(paths[1]) == []
    assert unlisted_files(paths[1]) == [".DS_Store", ".nfs0001", "__1_0.distcp", "dangling", "notes"]
    assert latest_valid(tmp_path, fail_on_problem) == paths[1]
    loaded = empty_like(make_state())
    load_checkpoint(paths[1], loaded)
    assert equal(loaded, make_state(2))
    assert prune(tmp_path, keep=2) == []
    assert (paths[1] / "notes" / "mine.txt").exists()
    flip_a_bit(paths[1])  # negative control: among stray files, damage is still damage
    assert [f"{SHARD} is damaged" in line for line in verify_checkpoint(paths[1])] == [True]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN])
@pytest.mark.parametrize("name", [SHARD, ".metadata", "manifest.json", None])
def test_a_temporary_read_error_is_not_damage(tmp_path, monkeypatch, number, name):
    """No older checkpoint is taken for it, and nothing is renamed. None: the folder of all checkpoints."""
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (1, 2)]
    where = tmp_path if name is None else paths[1] / name
    opened, listed = io.open, Path.iterdir

    def refuse(file, *arguments, **options):
        if Path(file) == where:
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, *arguments, **options)

    def refuse_to_list(self):
        if self == where:
            raise OSError(number, os.strerror(number), str(self))
        return listed(self)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(Path, "iterdir", refuse_to_list)
    what = "listed" if name is None else "read"
    message = (
        f"{where} cannot be {what} ({os.strerror(number)}); nothing is known to be damaged: check the disk or mount"
    )
    with pytest.raises(StorageError, match=re.escape(message)):
        latest_valid(tmp_path, fail_on_problem)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert latest_valid(tmp_path, fail_on_problem) == paths[1]
    (paths[1] / SHARD).unlink()  # negative control: what is missing is damage
    reported = []
    assert latest_valid(tmp_path, lambda path, problems: reported.append(path)) == paths[0]
    assert reported == [paths[1]]


def test_a_checkpoint_in_a_folder_of_another_step_is_refused(tmp_path):
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (15, 30)]
    renamed = paths[1].rename(checkpoint_path(tmp_path, 45))
    message = (
        f"{renamed} is named like the checkpoint of step 45, but its manifest.json says step 30; rename it to "
        f"step-00000030, or move"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        latest_valid(tmp_path, fail_on_problem)
    shutil.copytree(renamed, paths[1])
    with pytest.raises(UserError, match=re.escape(f"says step 30; move it out of {tmp_path}")):
        latest_valid(tmp_path, fail_on_problem)
    shutil.rmtree(renamed)
    assert latest_valid(tmp_path, fail_on_problem) == paths[1]


def test_a_damaged_checkpoint_stays_until_a_newer_one_is_committed_and_verified(tmp_path):
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (1, 2, 3)]
    mark_damaged(paths[2])
    assert steps_on_disk(tmp_path) == {1, 2, 3}
    (damaged,) = tmp_path.glob("step-00000003.tmp-damaged-*")
    assert prune(tmp_path, keep=3) == []
    assert damaged.exists()  # the newest is of an earlier step

    later = save_checkpoint(tmp_path, make_state(4), make_train_state(4))
    flip_a_bit(later)
    (problem,) = prune(tmp_path, keep=4)
    assert f"step-00000004/{SHARD} is damaged" in problem
    assert damaged.exists()

    flip_a_bit(later)
    assert prune(tmp_path, keep=4) == []
    assert not damaged.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002", "step-00000004"]


def test_a_checkpoint_that_is_a_link_to_another_disk_loses_only_its_link(tmp_path):
    elsewhere = save_checkpoint(tmp_path / "elsewhere", make_state(1), make_train_state(1))
    there = tmp_path / "checkpoints"
    save_checkpoint(there, make_state(2), make_train_state(2))
    checkpoint_path(there, 1).symlink_to(elsewhere)
    prune(there, keep=1)
    assert [path.name for path in there.iterdir()] == ["step-00000002"]
    assert verify_checkpoint(elsewhere) == []


def test_a_full_disk_is_an_os_error_and_leaves_nothing_behind(tmp_path):
    save_checkpoint(tmp_path, make_state(1), make_train_state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path, make_state(2), make_train_state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001"]


def test_prune_keeps_the_newest_and_deletes_unfinished_checkpoints(tmp_path):
    for step in (5, 100_000_000, 20, 7):
        save_checkpoint(tmp_path, make_state(step), make_train_state(step))
    for step in (6, 100_000_000, 100_000_001):
        partial_path(tmp_path, step, "dead").mkdir()
    (tmp_path / "notes.tmp-mine").touch()
    prune(tmp_path, keep=2)
    kept = {"step-00000020", "step-100000000", "step-100000001.tmp-dead", "notes.tmp-mine"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    prune(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_half_deleted_checkpoint_never_looks_valid(tmp_path, monkeypatch):
    paths = [save_checkpoint(tmp_path, make_state(step), make_train_state(step)) for step in (1, 2)]
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)  # killed before the first file went
    prune(tmp_path, keep=1)
    assert not paths[0].exists()
    assert latest_valid(tmp_path, fail_on_problem) == paths[1]
    monkeypatch.undo()
    prune(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [paths[1]]


def test_the_manifest_is_plain_json_with_the_sum_of_every_file(tmp_path):
    path = save_checkpoint(tmp_path, make_state(), make_train_state(12))
    content = json.loads((path / "manifest.json").read_text())
    assert content["step"] == 12
    assert content["samples"] == 384
    assert content["format"] == 1
    assert content["config"]["optim"]["lr"] == 3e-4
    assert {name: entry["size"] for name, entry in content["files"].items()} == {
        name: (path / name).stat().st_size for name in (SHARD, ".metadata")
    }
