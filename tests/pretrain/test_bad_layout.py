"""Every impossible layout ends in exit code 2 and one line with the remedy, before any process group starts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import Layout
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.errors import UserError
from pretrain.setup.machine import GPU_CLUSTER
from pretrain.setup.memory import GIB, batch_fits_host
from pretrain.setup.resolve import resolve_for_cluster, resolve_run

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py

HEADS = ("model.n_heads=8", "model.n_kv_heads=4")
TWELVE_HEADS = ("model.n_heads=12", "model.head_dim=4", "model.d_ff=96", "model.vocab_size=384")
EXPERTS = ("model.architecture=moe", "model.moe.n_experts=8", "model.moe.d_ff=12")
LONG = ("model.n_layers=8", "train.batch_size=32", "train.micro_batch_size=1")

REFUSED: dict[str, tuple[int, tuple[str, ...], str]] = {
    "more ranks than processes": (
        4,
        ("parallel.shard=4", "parallel.tensor=2"),
        "parallel.shard=4 x parallel.tensor=2 = 8 needs 8 processes, but there are 4 processes: start 8, or set "
        "parallel.shard=2",
    ),
    "a layout without its processes": (
        1,
        ("parallel.replicate=2", "parallel.shard=1"),
        "parallel.replicate=2 needs 2 processes, but there is 1 process: start 2, or set parallel.replicate=1",
    ),
    "more processes than ranks": (
        6,
        ("parallel.shard=4",),
        "parallel.shard=4 needs 4 processes, but there are 6 processes: start 4, or set parallel.shard=6",
    ),
    "no whole number of ranks left": (
        8,
        ("parallel.tensor=3",),
        "parallel.tensor=3 does not divide the 8 processes: use 1, 2, 4 or 8, or start 3 or a multiple of that",
    ),
    "no whole number of ranks left by several": (
        8,
        ("parallel.tensor=3", "parallel.pipeline=2"),
        "parallel.pipeline=2 x parallel.tensor=3 = 6 does not divide the 8 processes: change one of them, or start 6 "
        "or a multiple of that",
    ),
    "experts of a dense model": (
        2,
        ("parallel.expert=2",),
        "parallel.expert=2 divides experts, and this model has none: use 1",
    ),
    "expert tensor parallelism of a dense model": (
        2,
        ("parallel.expert_tensor=2",),
        "parallel.expert_tensor=2 divides experts, and this model has none: use 1",
    ),
    "experts": (
        3,
        (*EXPERTS, "parallel.expert=3", "train.batch_size=6"),
        "parallel.expert=3 does not divide model.moe.n_experts=8: use 1, 2, 4 or 8",
    ),
    "width of experts": (
        8,
        (*EXPERTS, "parallel.expert_tensor=8", "train.batch_size=8"),
        "parallel.expert_tensor=8 does not divide model.moe.d_ff=12: use 1, 2, 3, 4, 6 or 12",
    ),
    "expert axes that do not fold": (
        4,
        (*EXPERTS, "parallel.replicate=2", "parallel.expert=4"),
        "parallel.expert=4 x parallel.expert_tensor=1 = 4 does not divide the 2 ranks of parallel.shard=2 x "
        "parallel.context=1 x parallel.tensor=1: use a product of 1 or 2",
    ),
    "tokens of layers with experts": (
        2,
        (*HEADS, *EXPERTS, "parallel.tensor=2", "parallel.sequence=false", "data.seq_len=31"),
        "data.seq_len=31 is not divisible by parallel.tensor=2, and tensor ranks divide the tokens of layers with "
        "experts: use a multiple of 2, such as 32",
    ),
    "DeepEP": (
        2,
        (*EXPERTS, "parallel.expert=2", "parallel.expert_dispatch=deepep", "train.precision=fp32"),
        "parallel.expert_dispatch=deepep also needs the package deep_ep, train.device=cuda, train.precision=bf16: set "
        "that, or parallel.expert_dispatch=all_to_all",
    ),
    "compiled experts that are recomputed in part": (
        2,
        (*EXPERTS, "parallel.expert=2", "train.compile=true", "train.recompute=selective"),
        "train.compile=true does not go with experts on several ranks (parallel.expert, expert_tensor or tensor) and "
        "train.recompute=selective, which would keep what compiled code writes over: use train.recompute=full or "
        "train.compile=false",
    ),
    "heads": (3, ("parallel.tensor=3",), "parallel.tensor=3 does not divide model.n_heads=2: use 1"),
    "key/value heads": (
        8,
        (*HEADS, "parallel.tensor=8"),
        "parallel.tensor=8 does not divide model.n_kv_heads=4: use 1, 2 or 4, or let ranks share a head with "
        "parallel.replicate_kv=true",
    ),
    "key/value heads that cannot be shared evenly": (
        6,
        (*TWELVE_HEADS, "model.n_kv_heads=4", "parallel.tensor=6", "parallel.replicate_kv=true"),
        "parallel.tensor=6 is not a multiple of model.n_kv_heads=4, so parallel.replicate_kv cannot share them out "
        "evenly: "
        "use 1, 2, 4 or 12",
    ),
    "MLP": (
        4,
        (*HEADS, "model.d_ff=66", "parallel.tensor=4"),
        "parallel.tensor=4 does not divide model.d_ff=66: use 1 or 2",
    ),
    "vocabulary": (
        4,
        (*HEADS, "model.vocab_size=322", "parallel.tensor=4"),
        "parallel.tensor=4 does not divide model.vocab_size=322: use 1 or 2, or model.vocab_size=384",
    ),
    "sequence parallelism of one": (
        2,
        ("parallel.sequence=true",),
        "parallel.sequence=true divides among tensor ranks, and parallel.tensor=1: use parallel.sequence=auto, or "
        "more ranks",
    ),
    "sequence in chunks": (
        4,
        ("parallel.context=4", "data.seq_len=28"),
        "data.seq_len=28 cannot be cut into 2 x parallel.context=4 equal pieces, an early and a late one for each "
        "rank: "
        "use a multiple of 8, such as 32",
    ),
    "sequence in parts": (
        4,
        (*HEADS, "parallel.context=4", "parallel.context_method=ulysses", "data.seq_len=30"),
        "data.seq_len=30 cannot be cut into parallel.context=4 pieces: use a multiple of 4, such as 32",
    ),
    "sequence parallelism": (
        4,
        (*HEADS, "parallel.tensor=4", "data.seq_len=30"),
        "data.seq_len=30 is not divisible by parallel.tensor=4, as parallel.sequence=true requires: use a "
        "multiple of 4, "
        "such as 32, "
        "or parallel.sequence=false",
    ),
    "sequence parallelism of context parts": (
        8,
        (*HEADS, "parallel.tensor=4", "parallel.context=2", "data.seq_len=20"),
        "data.seq_len=20 / parallel.context=2 = 10 is not divisible by parallel.tensor=4, as parallel.sequence=true "
        "requires: "
        "use a multiple of 8, such as 24, or parallel.sequence=false",
    ),
    "Ulysses and key/value heads": (
        8,
        (*HEADS, "parallel.tensor=2", "parallel.context=4", "parallel.context_method=ulysses"),
        "parallel.context=4 with parallel.context_method=ulysses does not divide the 2 heads of a rank "
        "(model.n_kv_heads=4 on "
        "parallel.tensor=2): use 1 or 2, or parallel.context_method=gather",
    ),
    "batch": (
        8,
        (),
        "train.batch_size=4 is not divisible by the 8 data ranks (parallel.replicate=1 x parallel.shard=8): use a "
        "multiple of 8, such as 8",
    ),
    "microbatch": (
        2,
        ("train.micro_batch_size=3",),
        "train.micro_batch_size=3 is larger than train.batch_size=4 / 2 data ranks = 2: use at most that",
    ),
    "longer sequences": (
        4,
        ("data.seq_len_schedule=[{from: 50%, seq_len: 64}]",),
        "data.seq_len_schedule: a batch of train.batch_size=4 holds 2 sequences of seq_len=64, which 4 data ranks "
        "cannot share evenly: "
        "use a batch that is a multiple of 8, or fewer data ranks",
    ),
    "microbatches of several sizes": (
        2,
        ("parallel.pipeline=2", "train.batch_size=7", "train.micro_batch_size=2"),
        "train.micro_batch_size=2 does not divide the 7 sequences of a data rank, and a pipeline takes microbatches "
        "of one size: "
        "use 1 or 7",
    ),
    "more stages than layers": (
        4,
        ("parallel.pipeline=4",),
        "parallel.pipeline=4 * parallel.stages_per_rank=1 is 4 stages, more than model.n_layers=2; use a "
        "parallel.pipeline of at most 2",
    ),
    "fewer microbatches than stages": (
        8,
        (*LONG, "parallel.pipeline=8", "train.micro_batch_size=8"),
        "parallel.pipeline=8 needs as many microbatches a step, but train.batch_size and train.micro_batch_size give "
        "each data rank 4; "
        "raise the first, lower the second, or use a parallel.pipeline of at most 4",
    ),
    "fewer microbatches than stages in a ramp": (
        4,
        (*LONG, "parallel.pipeline=4", "train.batch_ramp_steps=10", "train.batch_ramp_start=2"),
        "use a parallel.pipeline of at most 2 (in the batch ramp, at 2 sequences; raise train.batch_ramp_start)",
    ),
    "rounds of microbatches": (
        4,
        (*LONG, "train.batch_size=9", "parallel.pipeline=4", "parallel.schedule=interleaved"),
        "parallel.schedule=interleaved works in rounds of parallel.pipeline=4 microbatches",
    ),
    "stages of a schedule": (
        2,
        (*LONG, "parallel.pipeline=2", "parallel.schedule=zbv", "parallel.stages_per_rank=3"),
        "parallel.stages_per_rank=3 does not go with parallel.schedule=zbv, which wants 2; leave it at auto, or "
        "choose another schedule",
    ),
    "stages without a pipeline": (
        2,
        ("parallel.stages_per_rank=2",),
        "parallel.stages_per_rank=2 needs a pipeline, and parallel.pipeline=1: use 1 or auto",
    ),
    "zero bubble, compiled around what is kept": (
        2,
        (*LONG, "parallel.pipeline=2", "parallel.schedule=zbv", "train.compile=true", "train.recompute=selective"),
        "train.compile=true does not go with parallel.schedule=zbv and train.recompute=selective, which would keep "
        "what compiled code "
        "writes over: use train.recompute=full, train.compile=false, or parallel.schedule=interleaved or 1f1b",
    ),
    "resharding of what stays whole": (
        2,
        ("parallel.zero=2", "parallel.reshard_to=2"),
        "parallel.reshard_to=2 is for parallel.zero=3, and parallel.zero=2 does not shard parameters: "
        "set parallel.zero=3, or leave parallel.reshard_to out",
    ),
    "resharding to no part": (
        4,
        ("parallel.reshard_to=3",),
        "parallel.reshard_to=3 does not divide the 4 ranks that share the parameters (parallel.shard=4 x "
        "parallel.context=1): use 2 or 4",
    ),
    "offload of a CPU": (
        2,
        ("parallel.offload=true",),
        "parallel.offload=true moves state from a GPU to host memory, and train.device=cpu: use parallel.offload=false",
    ),
    "asynchronous tensor parallelism of products that are not compiled": (
        4,
        (
            *LONG,
            "parallel.tensor=2",
            "parallel.replicate_kv=true",
            "parallel.pipeline=2",
            "parallel.schedule=zbv",
            "parallel.async_tensor=true",
        ),
        "parallel.async_tensor=true also needs train.device=cuda, train.compile=true, a parallel.schedule that splits "
        "no backward pass (",
    ),
    "asynchronous tensor parallelism on a CPU": (
        2,
        ("parallel.async_tensor=true",),
        "parallel.async_tensor=true also needs train.device=cuda, train.compile=true, parallel.tensor above 1, "
        "parallel.sequence=true: "
        "set that, or parallel.async_tensor=false",
    ),
}


@pytest.mark.parametrize(("world_size", "args", "message"), REFUSED.values(), ids=REFUSED)
def test_an_impossible_layout_is_one_line_and_starts_nothing(
    pretrain: Pretrain,
    monkeypatch: pytest.MonkeyPatch,
    tiny_args: Callable[..., list[str]],
    tmp_path: Path,
    world_size: int,
    args: tuple[str, ...],
    message: str,
) -> None:
    # Not by WORLD_SIZE: `main` would wait for the other ranks, to end with them. What is asked here is what `train`
    # says.
    monkeypatch.setattr("pretrain.train.run.World", _FakeWorld(world_size))
    monkeypatch.setattr("torch.distributed.init_process_group", _must_not_start)
    answer = pretrain("train", *tiny_args(tmp_path / "run", *args))
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert message in answer.err
    assert not (tmp_path / "run").exists()


class _FakeWorld:
    """Replaces `World`, which tells a run the number of processes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def from_environment(self) -> World:
        return World(0, self.size, 0, self.size)


def _must_not_start(*_: object, **__: object) -> None:
    raise AssertionError("a process group was started")


def planned(world_size: int, *args: str) -> tuple[RunConfig, Layout]:
    resolved = resolve_for_cluster(load(None, args).config, world_size)
    return resolved.config, resolved.layout


GOOD = [
    (8, ("parallel.tensor=4",)),
    (8, ("parallel.tensor=8", "model.n_heads=8", "model.n_kv_heads=4", "parallel.replicate_kv=true")),
    (16, ("parallel.context=4", "parallel.tensor=2", "data.seq_len_schedule=[{from: 50%, seq_len: 256}]")),
    (16, ("parallel.context=2", "parallel.context_method=ulysses", "parallel.tensor=2", "model.sliding_window=16")),
    (8, ("parallel.pipeline=4", "parallel.schedule=interleaved")),
    (
        8,
        (
            "parallel.pipeline=4",
            "parallel.schedule=zbv",
            "parallel.zero=3",
            "train.compile=true",
            "train.recompute=full",
        ),
    ),
    (8, ("parallel.pipeline=4", "parallel.schedule=zbv", "train.recompute=selective")),
    (4, ("parallel.shard=2", "parallel.tensor=2", "optim.kind=muon")),
    (8, ("parallel.tensor=2", "parallel.async_tensor=true")),
    (8, ("parallel.reshard_to=4", "parallel.offload=true")),
]
SHAPE = (
    "model.n_layers=8",
    "model.n_heads=8",
    "model.n_kv_heads=8",
    "model.vocab_size=512",
    "data.seq_len=128",
    "train.batch_size=64",
)


@pytest.mark.parametrize(("world_size", "args"), GOOD, ids=str)
def test_possible_layouts_are_accepted(world_size: int, args: tuple[str, ...]) -> None:
    _, layout = planned(world_size, *SHAPE, *args)
    assert layout.world_size == world_size


def test_auto_sizes_are_the_processes_that_the_others_leave() -> None:
    _, layout = planned(16, *SHAPE, "parallel.tensor=2", "parallel.pipeline=2")
    assert (layout.shard, layout.replicate, layout.zero, layout.sequence, layout.stages_per_rank) == (4, 1, 2, True, 1)
    _, layout = planned(16, *SHAPE, "parallel.shard=2", "parallel.replicate=auto")
    assert (layout.shard, layout.replicate, layout.zero, layout.sequence) == (2, 8, 3, False)


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ((), 8),  # of 8 a rank
        (("parallel.pipeline=4",), 4),  # 32 a rank, 8 microbatches
        (("parallel.pipeline=4", "train.batch_size=8"), 1),  # 4 a rank: 8 microbatches are not to be had
        (
            ("parallel.pipeline=2", "parallel.schedule=interleaved", "train.batch_size=48"),
            3,
        ),  # 12 a rank, in rounds of 2
        (("data.seq_len=16384", "model.max_seq_len=32768"), 1),
        (("data.seq_len=16384", "model.max_seq_len=32768", "parallel.context=4", "parallel.shard=2"), 4),
    ],
    ids=str,
)
def test_microbatches_fill_the_pipeline_and_count_a_context_ranks_tokens(args: tuple[str, ...], size: int) -> None:
    config, _ = planned(8, *SHAPE, *args)
    assert config.train.micro_batch_size == size


def test_auto_does_not_compile_what_cannot_be_compiled() -> None:
    schedule = (*SHAPE, "parallel.pipeline=4", "parallel.schedule=zbv")
    modes = {
        mode: planned(8, *schedule, f"train.recompute={mode}")[0].train.compile
        for mode in ("none", "full", "selective")
    }
    assert modes == {"none": True, "full": True, "selective": False}


BIG = ("model.preset=llama3-8b", "data.seq_len=8192", "train.batch_size=64")


@pytest.mark.parametrize(
    ("world_size", "args", "way_out"),
    [
        (8, ("parallel.zero=1",), "use parallel.zero=3"),
        (8, ("parallel.shard=2", "parallel.replicate=4"), "use parallel.shard=4 parallel.replicate=2"),
        (1, (), "use parallel.shard=4 on 4 processes"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_is_refused_with_the_smallest_change_that_does(
    world_size: int, args: tuple[str, ...], way_out: str
) -> None:
    config, layout = planned(world_size, *BIG, *args)  # with memory that is not known
    small = replace(GPU_CLUSTER, device_bytes=lambda device: 39 * GIB if device == "cuda" else None)
    with pytest.raises(
        UserError, match=rf"the fullest rank would hold .* GiB .*, and a device has 39\.0 GiB: {way_out}"
    ):
        resolve_run(config, tokenizer_size=300, world_size=world_size, machine=small)
    assert resolve_run(config, tokenizer_size=300, world_size=world_size, machine=GPU_CLUSTER).layout == layout
    fits, _ = planned(8, *BIG)
    assert resolve_run(fits, tokenizer_size=300, world_size=8, machine=small).memory.static_bytes <= 39 * GIB


def test_a_batch_that_does_not_fit_into_the_host_is_refused_with_the_largest_that_does() -> None:
    config, layout = planned(
        8, *BIG, "parallel.zero=1", "parallel.tensor=2"
    )  # 4 data ranks of 16 sequences, each 2 x 16 x 8,192 bytes
    assert batch_fits_host(config, layout, 16 * 2 * 16 * 8192) is None
    small = replace(GPU_CLUSTER, host_bytes=lambda: 15 * 2 * 16 * 8192)
    with pytest.raises(UserError, match=r"train\.batch_size=64 .* data\.seq_len=8192 tokens need .*: at most 60 fit"):
        resolve_run(config, tokenizer_size=300, world_size=8, machine=small)
