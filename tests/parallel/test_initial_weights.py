"""The same seed gives the same initial weights on every layout, and no rank allocates more than its shards."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # no public name
from torch.utils._pytree import tree_leaves

from benchmarks.parity.cases import TIED
from benchmarks.parity.compare import CPU, full_copy, make_config
from parallel.engines.torch.build import build_engine
from parallel.layout import Layout
from pretrain.setup.engine import build_engine_options, build_model_spec
from tests.workers import WorkerPool

UNEVEN = ("model.n_layers=5", "model.d_ff=100", "run.seed=7")
WIDE = (
    "model.n_layers=1",
    "model.d_model=512",
    "model.n_heads=8",
    "model.head_dim=64",
    "model.d_ff=2048",
    "model.vocab_size=8192",
)

EXPERTS = (
    "model.architecture=moe",
    "model.moe.n_experts=6",
    "model.moe.n_shared_experts=1",
    "model.moe.n_dense_layers=1",
    "model.moe.expert_bias=true",
)

LAYOUTS = [
    Layout(shard=3),
    Layout(shard=4, zero=1),
    Layout(replicate=2, shard=2),
    Layout(tensor=4, sequence=True),
    Layout(tensor=4, replicate_kv=True),
    Layout(pipeline=4),
    Layout(pipeline=2, schedule="zbv", stages_per_rank=2, zero=2),
    Layout(shard=2, context=2),
    Layout(shard=2, tensor=2, pipeline=2),
]


def initial(layout: Layout, args: tuple[str, ...]) -> dict[str, Tensor]:
    """The full parameters that this rank holds shards of, before the first step."""
    config = make_config(args)
    engine = build_engine(
        build_model_spec(config),
        build_engine_options(config),
        layout=layout,
        rank=dist.get_rank() if layout.world_size > 1 else 0,
        device=CPU,
    )
    return {name: full_copy(tensor) for name, tensor in engine.master_weights.items()}


@pytest.mark.parametrize("tied", [(), TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout).replace(" ", "_"))
def test_the_same_seed_gives_the_same_bits(layout: Layout, tied: tuple[str, ...], workers: WorkerPool) -> None:
    args = (*UNEVEN, *tied, *(("model.n_kv_heads=2",) if layout.replicate_kv else ()))
    expected = initial(Layout(), args)
    found = workers.run(initial, layout.world_size, layout, args)
    assert {name for tensors in found for name in tensors} == expected.keys()
    for tensors in found:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(shard=4),  # 6 experts on 4 ranks
        Layout(shard=4, expert=2, zero=1),
        Layout(replicate=2, shard=2, expert=2),
        Layout(shard=2, tensor=2, sequence=True, expert=2, expert_tensor=2),
        Layout(pipeline=2, context=3, expert=3),
    ],
    ids=lambda layout: str(layout).replace(" ", "_"),
)
def test_the_same_seed_gives_stacked_experts_the_same_bits(layout: Layout, workers: WorkerPool) -> None:
    args = (*UNEVEN, *EXPERTS)
    expected = initial(Layout(), args)
    assert sum(tensor.ndim == 3 for tensor in expected.values()) == 8
    found = workers.run(initial, layout.world_size, layout, args)
    assert {name for tensors in found for name in tensors} == expected.keys()
    for tensors in found:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_another_seed_gives_other_weights() -> None:
    args = (*EXPERTS, *UNEVEN)
    one, other = initial(Layout(), args), initial(Layout(), (*args[:-1], "run.seed=8"))
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items() if tensor.ndim > 1)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is made on the CPU."""

    numel = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = function(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if _in_memory(t))]
        )
        return out


def _in_memory(value: object) -> bool:
    return isinstance(value, Tensor) and type(value) is Tensor and value.device.type == "cpu"


def largest(layout: Layout) -> tuple[int, int]:
    """(elements of the largest tensor made while the engine is built, elements of this rank's largest shard)."""
    config = make_config(WIDE)
    rank = dist.get_rank() if layout.world_size > 1 else 0
    with Largest() as mode:
        engine = build_engine(
            build_model_spec(config), build_engine_options(config), layout=layout, rank=rank, device=CPU
        )
    parts = [getattr(master, "_local_tensor", master) for master in engine.master_weights.values()]
    return mode.numel, max(part.numel() for part in parts)


@pytest.mark.parametrize(
    "layout", [Layout(shard=4), Layout(tensor=4, sequence=True), Layout(shard=2, tensor=2)], ids=str
)
def test_no_rank_allocates_more_of_a_parameter_than_its_shard(layout: Layout, workers: WorkerPool) -> None:
    embedding = 8192 * 512
    assert largest(Layout()) == (embedding, embedding)
    for made, tensors in workers.run(largest, layout.world_size, layout):
        assert tensors == embedding // 4
        assert made == tensors
