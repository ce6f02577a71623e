"""Checkpoints of several ranks: written by all, committed once, and read on any other layout, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from workers import CaseFailed, WorkerPool

from data_pipeline.errors import StorageError
from parallel.layout import Layout
from parallel.mesh import build_mesh, data_mesh
from pretrain.checkpoint.directory import latest_valid, mark_damaged
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import TrainState, read_manifest
from pretrain.checkpoint.prune import prune
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.errors import UserError

ALONE = Layout()
LAYOUTS = [
    Layout(shard=2, tensor=2),
    Layout(pipeline=2, shard=2),
    Layout(shard=4),
    Layout(replicate=2, context=2),
    Layout(pipeline=2),
]

SPLIT = {"embed": Shard(0), "up": Shard(0), "down": Shard(1), "norm": Replicate()}
SHAPES = {"embed": (10, 6), "up": (14, 6), "down": (6, 14), "norm": (3,)}
"""Over four ranks none of them divides evenly, and `norm` is not there at all on the last."""


def names(layout: Layout, rank: int) -> list[str]:
    """Two blocks and a tied embedding, which the first and the last stage hold."""
    blocks = [[f"layers.{layer}.{part}" for part in ("up", "down", "norm")] for layer in range(2)]
    if layout.pipeline == 1:
        return ["embed", *blocks[0], *blocks[1]]
    return ["embed", *blocks[layout.coordinates(rank)["pipeline"]]]


def full_tensor_of(name: str, seed: int) -> Tensor:
    number = sum(name.encode()) + 1000 * seed
    return torch.randn(SHAPES[name.rpartition(".")[2]], generator=torch.Generator().manual_seed(number))


def make_state(layout: Layout, seed: int, rank: int = 0) -> dict[str, Any]:
    """Parameters sharded by tensor parallelism and then FSDP, as in the engine, and the state of an optimizer."""
    parameters = {name: full_tensor_of(name, seed) for name in names(layout, rank)}
    if layout.world_size > 1:
        mesh = build_mesh(layout, "cpu")
        module = nn.ParameterDict()
        for name, value in parameters.items():
            placement = SPLIT[name.rpartition(".")[2]]
            split = distribute_tensor(value, mesh["tensor"], [placement]) if layout.tensor > 1 else value
            module[name.replace(".", "/")] = nn.Parameter(split)
        fully_shard(module, mesh=data_mesh(mesh, layout))
        parameters = {name.replace("/", "."): parameter.detach() for name, parameter in module.named_parameters()}
    moments = {
        name: {"step": torch.tensor(float(seed)), "exp_avg": value.clone()} for name, value in parameters.items()
    }
    return {"model": parameters, "optimizer": moments}


def differing(state: dict[str, Any], layout: Layout, seed: int) -> list[str]:
    """Tensors of this rank that are not, bit for bit, those of that seed."""

    def full(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    model = [
        name for name, tensor in state["model"].items() if not torch.equal(full(tensor), full_tensor_of(name, seed))
    ]
    moments = [
        name
        for name, slots in state["optimizer"].items()
        if not torch.equal(full(slots["exp_avg"]), full_tensor_of(name, seed))
    ]
    return model + moments + [name for name, slots in state["optimizer"].items() if slots["step"] != seed]


def make_train_state(step: int, layout: Layout) -> TrainState:
    return TrainState(step=step, samples=step, config={}, dataset="", order="", layout={"shard": layout.shard}, rng={})


def world(layout: Layout) -> Any:
    return group.WORLD if layout.world_size > 1 else None


def save(layout: Layout, folder: Path, seed: int) -> Path:
    rank = torch.distributed.get_rank() if layout.world_size > 1 else 0
    return save_checkpoint(folder, make_state(layout, seed, rank), make_train_state(seed, layout), world(layout))


def load(layout: Layout, path: Path, seed: int) -> list[str]:
    """Load into a state of other values, and compare."""
    rank = torch.distributed.get_rank() if layout.world_size > 1 else 0
    state = make_state(layout, seed + 1, rank)
    held = state["model"]["embed"]
    load_checkpoint(path, state, world(layout))
    assert held is state["model"]["embed"]
    return differing(state, layout, seed)


def on(workers: WorkerPool, layout: Layout, function: Callable[..., Any], *arguments: object) -> list[Any]:
    if layout.world_size == 1:
        return [function(layout, *arguments)]
    return workers.run(function, layout.world_size, layout, *arguments)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_checkpoint_of_any_layout_is_read_on_any_other_bit_for_bit(
    workers: WorkerPool, tmp_path: Path, layout: Layout
) -> None:
    paths = on(workers, layout, save, tmp_path, 3)
    assert paths == [tmp_path / "step-00000003"] * layout.world_size
    assert verify_checkpoint(paths[0]) == []
    assert load(ALONE, paths[0], 3) == []
    for other in LAYOUTS:
        assert on(workers, other, load, paths[0], 3) == [[]] * other.world_size


def test_one_process_writes_what_any_layout_reads_and_a_changed_value_is_noticed(
    workers: WorkerPool, tmp_path: Path
) -> None:
    path = save(ALONE, tmp_path, 5)
    for layout in LAYOUTS:
        assert on(workers, layout, load, path, 5) == [[]] * layout.world_size
    state = make_state(ALONE, 5)
    state["model"]["layers.1.down"][5, 13] += 1
    shutil.rmtree(path)
    save_checkpoint(tmp_path, state, make_train_state(5, ALONE))
    for layout in LAYOUTS:
        found = on(workers, layout, load, path, 5)
        assert found == [
            ["layers.1.down"] if "layers.1.down" in names(layout, rank) else [] for rank in range(layout.world_size)
        ]


def test_every_rank_writes_a_file_of_its_own_and_the_manifest_has_the_sums_of_all(
    workers: WorkerPool, tmp_path: Path
) -> None:
    path = on(workers, Layout(shard=2, tensor=2), save, tmp_path, 1)[0]
    files = sorted(file.name for file in path.iterdir())
    assert files == [".metadata", *(f"__{rank}_0.distcp" for rank in range(4)), "manifest.json"]
    assert sorted(read_manifest(path).files) == files[:-1]
    assert json.loads((path / "manifest.json").read_text())["layout"] == {"shard": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001"]
    shard = path / "__2_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert ["__2_0.distcp is damaged" in problem for problem in verify_checkpoint(path)] == [True]


def find_latest_valid(folder: Path) -> tuple[Path | None, list[list[str]]]:
    reported: list[list[str]] = []
    return latest_valid(folder, lambda path, problems: reported.append(problems), group.WORLD), reported


@pytest.mark.parametrize("number", range(3))
def test_the_ranks_share_the_verification_and_find_the_same_checkpoint(
    workers: WorkerPool, tmp_path: Path, number: int
) -> None:
    """Whichever file is damaged, one rank reads it, and all pass the checkpoint over."""
    paths = [save(ALONE, tmp_path, step) for step in (1, 2)]
    files = sorted(file.name for file in paths[1].iterdir())
    assert files == [".metadata", "__0_0.distcp", "manifest.json"]
    assert workers.run(find_latest_valid, 2, tmp_path) == [(paths[1], [])] * 2
    (paths[1] / ".DS_Store").write_bytes(b"left over")
    assert workers.run(find_latest_valid, 2, tmp_path) == [(paths[1], [])] * 2
    file = paths[1] / files[number]
    file.write_bytes(file.read_bytes()[:-1])
    message = workers.run(find_latest_valid, 2, tmp_path)
    assert message[0] == message[1]
    assert message[0][0] == paths[0]
    assert [len(problems) for problems in message[0][1]] == [1]
    assert str(file) in message[0][1][0][0]
    assert sum(len(verify_checkpoint(paths[1], rank, 2)) for rank in range(2)) == 1


def latest_valid_if_rank_1_cannot_read(folder: Path) -> str:
    import errno
    import io
    import os

    opened = io.open

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if torch.distributed.get_rank() == 1 and str(file).endswith("step-00000002/__0_0.distcp"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))
        return opened(file, *arguments, **options)

    io.open = refuse
    try:
        return str(find_latest_valid(folder))
    except StorageError as error:
        return str(error)
    finally:
        io.open = opened


def test_a_temporary_read_error_on_one_rank_stops_all_ranks_and_changes_nothing(
    workers: WorkerPool, tmp_path: Path
) -> None:
    paths = [save(ALONE, tmp_path, step) for step in (1, 2)]
    message = workers.run(latest_valid_if_rank_1_cannot_read, 2, tmp_path)
    assert message[0] == message[1]
    assert message[0].startswith(
        f"{paths[1] / '__0_0.distcp'} cannot be read (Stale file handle); nothing is known to be damaged"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def prune_on_all(folder: Path) -> list[str]:
    return prune(folder, 3, group.WORLD)


def test_the_ranks_verify_together_before_damaged_checkpoints_go(workers: WorkerPool, tmp_path: Path) -> None:
    paths = [save(ALONE, tmp_path, step) for step in (1, 2)]
    mark_damaged(paths[0])
    shard = paths[1] / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    message = workers.run(prune_on_all, 2, tmp_path)
    assert [len(problems) for problems in message] == [1, 1]
    assert len(list(tmp_path.glob("step-00000001.tmp-damaged-*"))) == 1
    shard.write_bytes(content)
    assert workers.run(prune_on_all, 2, tmp_path) == [[], []]
    assert list(tmp_path.iterdir()) == [paths[1]]


def save_with_full_disk_on_rank_1(layout: Layout, folder: Path) -> str:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        save(layout, folder, 1)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "saved"


def test_a_full_disk_on_one_rank_is_an_os_error_on_all_and_leaves_nothing_behind(
    workers: WorkerPool, tmp_path: Path
) -> None:
    layout = Layout(shard=2)
    assert (
        workers.run(save_with_full_disk_on_rank_1, 2, layout, tmp_path / "checkpoints")
        == ["[Errno 27] File too large"] * 2
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert on(workers, layout, save, tmp_path / "checkpoints", 1) == [tmp_path / "checkpoints" / "step-00000001"] * 2


def refusal(layout: Layout, path: Path, change: str) -> str:
    """What a load says into a state that rank 1 has changed, and whether a tensor was touched all the same."""
    rank = torch.distributed.get_rank()
    state = make_state(layout, 9, rank)
    if rank == 1 and change == "fewer":
        del state["model"]["layers.1.up"]
    if rank == 1 and change == "more":
        state["model"]["layers.2.up"] = torch.zeros(14, 6)
    if rank == 1 and change == "dtype":
        state["model"]["layers.1.norm"] = state["model"]["layers.1.norm"].bfloat16()
    try:
        load_checkpoint(path, state, group.WORLD)
    except UserError as error:
        assert torch.equal(state["model"]["embed"].full_tensor(), full_tensor_of("embed", 9))
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("none", "loaded"),
        ("fewer", "1 tensor only in the checkpoint (model.layers.1.up)"),
        ("more", "1 tensor only in the run (model.layers.2.up)"),
        (
            "dtype",
            "1 tensor of another shape or dtype (model.layers.1.norm is float32[3] in the checkpoint and "
            "bfloat16[3] in the run)",
        ),
    ],
)
def test_the_tensors_of_all_ranks_together_must_match_the_checkpoint(
    workers: WorkerPool, tmp_path: Path, change: str, difference: str
) -> None:
    path = save(ALONE, tmp_path, 2)
    message = workers.run(refusal, 2, Layout(pipeline=2), path, change)
    assert message[0] == message[1]
    assert difference in message[0]


def save_twice(layout: Layout, folder: Path) -> list[str]:
    said = []
    for _ in range(2):
        try:
            said.append(save(layout, folder, 1).name)
        except UserError as error:
            said.append(str(error))
    return said


def test_a_valid_checkpoint_is_never_replaced_and_all_ranks_raise(workers: WorkerPool, tmp_path: Path) -> None:
    said = workers.run(save_twice, 2, Layout(shard=2), tmp_path)
    assert [first for first, _ in said] == ["step-00000001"] * 2
    assert all("step-00000001 exists already and was kept: another process" in second for _, second in said)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001"]


def save_tied_twice(folder: Path) -> None:
    rank = torch.distributed.get_rank()
    state = make_state(Layout(shard=2), 1, rank)
    if rank == 1:
        state["model"]["lm_head"] = state["model"]["embed"]
    save_checkpoint(folder, state, make_train_state(1, ALONE), group.WORLD)


def test_a_tied_parameter_under_two_names_is_refused_on_all_ranks_before_anything_is_written(
    workers: WorkerPool, tmp_path: Path
) -> None:
    with pytest.raises(CaseFailed, match=r"embed and model\.lm_head are the same tensor"):
        workers.run(save_tied_twice, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []
