"""What divides a model, on one CUDA GPU under NCCL: bf16, compiled, flash attention, in groups of one rank.

One GPU takes one NCCL rank, so that every collective runs and moves nothing; what they compute is tested on several ranks with gloo
(tests/parallel). Here the numbers must be those of the engine that divides nothing.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel import context, tensor
from parallel.engine import LocalTokens, ModelChunk, ModelSpec
from parallel.engines.torch import build as assembly
from parallel.engines.torch.engine import TorchEngine
from parallel.layout import Layout
from pretrain.config import RunConfig
from pretrain.setup.engine import build_engine, build_engine_options, build_model_spec
from tests.gpu.test_gpu_training import SEQ_LEN, config_of, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none here"),
]

STEPS = range(4)
COMPILED = ["false", pytest.param("true", marks=pytest.mark.compiles)]
BF16 = ("train.device=cuda", "train.precision=bf16")


@pytest.fixture(scope="module", autouse=True)
def nccl() -> Iterator[None]:
    """A group of this process alone."""
    torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def divided(config: RunConfig, layout: Layout, spec: ModelSpec | None = None) -> TorchEngine:
    return assembly.build_parallel_engine(
        spec or build_model_spec(config),
        build_engine_options(config),
        layout=layout,
        rank=0,
        device=torch.device(config.train.device, 0),
    )


def closeness(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> tuple[float, float]:
    """Largest relative error of (loss, gradient norm)."""
    errors = [[abs(a - b) / b for a, b in zip(x, y, strict=True)] for x, y in zip(ours, theirs, strict=True)]
    return max(loss for loss, _ in errors), max(norm for _, norm in errors)


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize(
    "layout", [Layout(zero=1), Layout(zero=2), Layout(zero=3), Layout(zero=3, offload=True)], ids=str
)
def test_sharded_steps_are_those_of_the_engine_that_divides_nothing(layout: Layout, compiled: str) -> None:
    config = config_of(*BF16, f"train.compile={compiled}")
    expected = train(build_engine(config), config, STEPS)
    loss, norm = closeness(train(divided(config, layout), config, STEPS), expected)
    assert loss < 2e-3
    assert norm < 1e-2


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_loss_and_less_memory_is_alive(mode: str) -> None:
    peaks, courses = [], []
    for args in ((), (f"train.recompute={mode}",)):
        config = config_of(*BF16, "train.compile=false", "model.n_layers=8", *args)
        engine = build_engine(config)
        train(engine, config, range(1))
        torch.cuda.reset_peak_memory_stats()
        courses.append(train(engine, config, STEPS))
        peaks.append(torch.cuda.max_memory_allocated())
    assert closeness(courses[1], courses[0])[0] < 2e-3
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("method", ["gather", "ulysses"])
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_and_context_parallel_modules_compute_what_they_are_made_of(
    sequence: bool, method: str, compiled: str
) -> None:
    """The split modules on meshes of one rank, with the flash kernels for the parts of a row that a context rank holds."""
    config = config_of(*BF16, f"train.compile={compiled}")
    spec = build_model_spec(config)
    mesh = assembly.build_mesh(Layout(), "cuda")

    def build(layers: range) -> nn.Module:
        part = spec.build(layers)
        described: ModelChunk = part
        tensor.apply_tensor_parallel(part, mesh["tensor"], described.tp_plan, sequence=sequence, replicate_kv=False)
        context.apply_context_parallel(part, mesh["context"], method)
        return part

    engine = divided(config, Layout(), replace(spec, build=build))
    halves, whole = ((0, SEQ_LEN // 2), (SEQ_LEN // 2, SEQ_LEN)), ((0, SEQ_LEN),)
    local_tokens = LocalTokens(halves, full_rows=False) if method == "gather" else LocalTokens(whole, full_rows=True)
    engine._model.shard_microbatch = lambda microbatch: context.shard_sequence(microbatch, local_tokens)
    loss, norm = closeness(train(engine, config, STEPS), train(build_engine(config), config, STEPS))
    assert loss < 2e-3
    assert norm < 1e-2
