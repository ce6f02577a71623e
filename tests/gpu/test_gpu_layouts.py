"""All kinds of parallelism on one CUDA GPU with NCCL: bf16, compiled, flash attention, in groups of one rank.

NCCL allows one rank per GPU, so every collective runs but moves nothing. tests/parallel checks with gloo what
collectives compute. Here the numbers must match the engine that shards nothing.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel import context, tensor
from parallel.engine import InspectableEngine, LocalTokens, ModelChunk, ModelSpec
from parallel.engines.torch import build
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
    """A process group of one rank."""
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


def build_parallel(config: RunConfig, layout: Layout, spec: ModelSpec | None = None) -> InspectableEngine:
    return build.build_parallel_engine(
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
def test_sharded_steps_match_the_engine_that_shards_nothing(layout: Layout, compiled: str) -> None:
    config = config_of(*BF16, f"train.compile={compiled}")
    expected = train(build_engine(config), config, STEPS)
    loss, norm = closeness(train(build_parallel(config, layout), config, STEPS), expected)
    assert loss < 2e-3
    assert norm < 1e-2


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_loss_and_takes_less_memory(mode: str) -> None:
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
def test_tensor_and_context_parallel_modules_match(sequence: bool, method: str, compiled: str) -> None:
    """On meshes of one rank, with flash kernels for the ranges of a row that a context rank holds."""
    config = config_of(*BF16, f"train.compile={compiled}")
    spec = build_model_spec(config)
    mesh = build.build_mesh(Layout(), "cuda")

    def build_chunk(layers: range) -> nn.Module:
        module = spec.build(layers)
        chunk: ModelChunk = module
        tensor.apply_tensor_parallel(module, mesh["tensor"], chunk.tp_plan, sequence=sequence, replicate_kv=False)
        context.apply_context_parallel(module, mesh["context"], method)
        return module

    engine = build_parallel(config, Layout(), replace(spec, build=build_chunk))
    halves, whole = ((0, SEQ_LEN // 2), (SEQ_LEN // 2, SEQ_LEN)), ((0, SEQ_LEN),)
    local_tokens = LocalTokens(halves, full_rows=False) if method == "gather" else LocalTokens(whole, full_rows=True)
    engine._model.shard_microbatch = lambda microbatch: context.shard_sequence(microbatch, local_tokens)
    loss, norm = closeness(train(engine, config, STEPS), train(build_engine(config), config, STEPS))
    assert loss < 2e-3
    assert norm < 1e-2
