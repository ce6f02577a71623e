"""The meters count what lives and what is sent; and a rank that is pretended holds and sends what a real one does."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from workers import WorkerPool

from parallel.engine import Microbatch
from parallel.engines.torch.build import build_engine
from parallel.layout import Layout
from parallel.simulate.communication import CommTracker
from parallel.simulate.fake_world import fake_world
from parallel.simulate.memory import MemoryTracker, tensor_kinds
from pretrain.config import RunConfig
from pretrain.setup.engine import build_engine_options, build_model_spec

KIB = 256  # fp32 numbers
CONFIG = RunConfig.model_validate(
    {
        "model": {
            "n_layers": 2,
            "d_model": 64,
            "n_heads": 8,
            "n_kv_heads": 8,
            "head_dim": 8,
            "d_ff": 192,
            "vocab_size": 256,
        },
        "data": {"seq_len": 16},
        "train": {"device": "cpu", "precision": "bf16", "compile": False, "attention": "sdpa"},
        "optim": {"warmup": 0, "decay": 1.0},
    }
)


def test_live_bytes_count_storages_once_and_forget_what_is_gone() -> None:
    with MemoryTracker() as memory:
        a = torch.zeros(KIB)
        view = a.view(16, 16)
        b = a + 1
        assert memory.live() == 2 * 1024
        del a, b
        assert memory.live() == 1024  # the view holds its storage
        view.untyped_storage().resize_(0)
        assert memory.live() == 0


def test_the_peak_is_that_of_the_moment_when_most_lived_and_tells_the_kinds() -> None:
    with MemoryTracker() as memory:
        weight = torch.ones(4 * KIB, requires_grad=True)
        memory.watch(lambda: {"parameters": [weight], "gradients": [weight.grad] if weight.grad is not None else []})
        loss = (weight * 2).exp().exp().sum()  # the product is gone when the second result is made
        assert memory.peak == pytest.approx(3 * 4096, rel=0.01)
        loss.backward()
        assert memory.by_kind() == {"parameters": 4096, "gradients": 4096, "activations": loss.nbytes}


def test_pretended_tensors_are_counted_and_take_no_memory() -> None:
    with fake_world(5, 64), MemoryTracker() as memory:
        huge = torch.empty(2**40, dtype=torch.bfloat16)
        assert memory.live() == 2**41
        assert dist.get_rank() == 5
        assert dist.get_world_size() == 64
        assert float(huge.sum()) == 1.0
        assert torch.arange(3).tolist() == [0, 1, 2]  # integers are real
    assert not dist.is_initialized()


def each_collective() -> dict[str, dict[str, int]]:
    """Every operation once, on a tensor of 4 KiB that is the whole of it or the rank's own."""
    n, rank = dist.get_world_size(), dist.get_rank()
    whole, part = torch.ones(4 * KIB), torch.ones(4 * KIB // n)
    with CommTracker(Layout(shard=n)) as comm:
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_reduce(whole)
        dist.all_to_all_single(torch.empty_like(whole), whole)
        if rank == 0:
            dist.send(whole, 1)
        if rank == 1:
            dist.recv(whole, 0)
        alone = dist.new_group([rank], use_local_synchronization=True)
        dist.all_reduce(whole, group=alone)
    return {axis: dict(sent) for axis, sent in comm.sent.items()}


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_sent_are_those_of_ring_algorithms(n: int, workers: WorkerPool) -> None:
    ring = 4096 * (n - 1) // n
    expected = {"all-gather": ring, "reduce-scatter": ring, "all-reduce": 2 * ring, "all-to-all": ring}
    first, *others = workers.run(each_collective, n)
    assert first == {"fsdp": expected | {"send": 4096}}
    assert all(other == {"fsdp": expected} for other in others)


def a_step(layout: Layout, rank: int) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """(bytes by kind before it, bytes sent in it), by axis and operation."""
    ids_BS = torch.arange(16)[None]
    microbatch = Microbatch(ids_BS, ids_BS, ids_BS, torch.zeros_like(ids_BS), n_targets=16)
    spec = replace(build_model_spec(CONFIG), init_shard=init_shard)
    with MemoryTracker() as memory:
        engine = build_engine(spec, build_engine_options(CONFIG), layout=layout, rank=rank, device=torch.device("cpu"))
        memory.watch(tensor_kinds(engine))
        held = memory.by_kind()
        with CommTracker(layout) as comm:
            engine.train_step([microbatch] * 2, lr_scale=1.0)
    del held["activations"]  # of the mesh, the ids
    return held, {axis: dict(sent) for axis, sent in comm.sent.items()}


def init_shard(name: str, part: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    part.fill_(0.01)


def a_real_step(layout: Layout) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    return a_step(layout, dist.get_rank())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(shard=2, tensor=2, sequence=True),
        Layout(replicate=2, shard=2, zero=1),
        Layout(pipeline=2, shard=2, zero=2),
    ],
    ids=str,
)
def test_a_pretended_rank_holds_and_sends_what_a_real_one_does(layout: Layout, workers: WorkerPool) -> None:
    for rank, real in enumerate(workers.run(a_real_step, layout.world_size, layout)):
        with fake_world(rank, layout.world_size):
            assert a_step(layout, rank) == real


def test_a_step_that_reduces_no_gradients_sends_less(workers: WorkerPool) -> None:
    layout = Layout(shard=2)
    (_, sent), _ = workers.run(a_real_step, 2, layout)
    (_, other), _ = workers.run(a_real_step, 2, replace(layout, zero=1))
    assert (
        sent["fsdp"]["reduce-scatter"] == 2 * other["fsdp"]["reduce-scatter"]
    )  # ZeRO-1 reduces once, not for each microbatch
