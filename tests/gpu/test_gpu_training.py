"""Training on a CUDA GPU: steps match the CPU, nothing waits or recompiles, and the command works."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from data_pipeline.reading.packing import Batch
from parallel.engine import InspectableEngine, Microbatch
from parallel.gradients import local_squared_norm
from parallel.layout import Layout
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import TrainState
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.estimate.hardware import find_accelerator
from pretrain.model.transformer import Transformer
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.setup.engine import build_engine, forward_step
from pretrain.setup.resolve import resolve_run
from pretrain.train.batching import split_microbatches, to_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none here"),
]

VOCABULARY, ROWS, SEQ_LEN = 512, 4, 256
CPU = ("train.device=cpu", "train.precision=fp32", "train.compile=false", "train.attention=sdpa")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test starts without graphs and without recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def config_of(*args: str) -> RunConfig:
    """2 layers of 4 query and 2 key/value heads of width 64. `auto` is resolved for this machine."""
    model = (
        "model.n_layers=2",
        "model.d_model=256",
        "model.n_heads=4",
        "model.n_kv_heads=2",
        "model.d_ff=512",
        "model.qk_norm=true",
    )
    run = (
        f"data.seq_len={SEQ_LEN}",
        f"train.batch_size={ROWS}",
        "train.micro_batch_size=2",
        "optim.lr=1e-3",
        "train.z_loss=1e-4",
    )
    return resolve_run(load(None, [*model, *run, *args]).config, tokenizer_size=VOCABULARY).config


def batch_of(seed: int, documents: int = 5, rows: int = ROWS) -> Batch:
    """Rows of `documents` documents of random length. Each token is the one before plus 7, which can be learned."""
    random = np.random.default_rng(seed)
    ids = (np.arange(SEQ_LEN + 1) * 7 + random.integers(VOCABULARY, size=(rows, 1))) % VOCABULARY
    document_ids = np.zeros((rows, SEQ_LEN), np.int32)
    for row in document_ids:
        row[random.choice(np.arange(1, SEQ_LEN), documents - 1, replace=False)] = 1
    document_ids = document_ids.cumsum(1, dtype=np.int32)
    starts = np.diff(document_ids, axis=1, prepend=-1) > 0
    labels = np.where(np.roll(starts, -1, axis=1), -100, ids[:, 1:])
    return Batch(ids[:, :-1].astype(np.int32), labels.astype(np.int32), document_ids)


def fed(config: RunConfig, batch: Batch) -> list[Microbatch]:
    device = torch.device(config.train.device)
    return list(split_microbatches(to_host(batch, device), config.train.micro_batch_size, device))


def train(engine: InspectableEngine, config: RunConfig, seeds: Sequence[int]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of one step per batch."""
    results = [engine.train_step(fed(config, batch_of(seed)), 1.0) for seed in seeds]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.fixture(scope="module")
def on_the_cpu() -> list[tuple[float, float]]:
    """The reference: three fp32 steps on the CPU."""
    config = config_of(*CPU)
    return train(build_engine(config), config, range(3))


@pytest.mark.parametrize(
    ("args", "loss_error", "norm_error"),
    [
        (("train.precision=fp32", "train.compile=false"), 1e-4, 1e-3),
        (("train.precision=bf16", "train.compile=false"), 2e-3, 1e-2),
        (("train.precision=bf16", "train.compile=false", "train.attention=sdpa"), 2e-3, 1e-2),
        pytest.param(("train.precision=bf16", "train.compile=true"), 2e-3, 1e-2, marks=pytest.mark.compiles),
    ],
    ids=["fp32", "bf16", "bf16 sdpa", "bf16 compiled"],
)
def test_three_steps_match_the_cpu_in_fp32(
    args: tuple[str, ...], loss_error: float, norm_error: float, on_the_cpu: list[tuple[float, float]]
) -> None:
    config = config_of("train.device=cuda", *args)
    for (loss, norm), (wanted_loss, wanted_norm) in zip(
        train(build_engine(config), config, range(3)), on_the_cpu, strict=True
    ):
        assert loss == pytest.approx(wanted_loss, rel=loss_error)
        assert norm == pytest.approx(wanted_norm, rel=norm_error)
    assert on_the_cpu[2][0] < on_the_cpu[0][0] * 0.98  # the model learns


def test_evaluation_matches_the_cpu() -> None:
    totals = []
    for args in (CPU, ("train.device=cuda",)):
        config = config_of(*args)
        total, targets, _ = build_engine(config).eval_step(fed(config, batch_of(0)))
        totals.append(total / targets)
    assert totals[1] == pytest.approx(totals[0], rel=2e-3)


def operators(step: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    return {event.key for event in trace.key_averages()}


def test_a_step_uses_the_fused_adamw_and_the_flash_kernels() -> None:
    config = config_of("train.device=cuda", "train.compile=false")
    engine = build_engine(config)
    used = operators(lambda: train(engine, config, [0]))
    assert "aten::_fused_adamw_" in used
    if config.train.attention == "varlen":
        assert {"aten::_flash_attention_forward", "aten::_flash_attention_backward"} <= used
    assert not {name for name in used if "_scaled_dot_product_attention_math" in name}


def test_the_forward_pass_never_waits_for_the_gpu() -> None:
    config = config_of("train.device=cuda", "train.compile=false")
    engine = build_engine(config)
    model = engine.model
    assert isinstance(model, Transformer)
    warm, *others = (fed(config, batch_of(seed, documents))[0] for seed, documents in ((0, 5), (1, 3), (2, 9)))
    forward_step(model, None, warm, z_loss=config.train.z_loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        totals = [forward_step(model, None, microbatch, z_loss=config.train.z_loss).total for microbatch in others]
        with pytest.raises(RuntimeError, match="synchronizing"):  # negative control: this waits
            totals[0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(total.item()) for total in totals)


def test_the_gradient_norm_matches_fp64_and_never_waits_for_the_gpu() -> None:
    gradients = [1e-3 * torch.randn(*shape, device="cuda") for shape in ((12_000_000,), (700, 300), (3,), (0,))]
    wanted = sum(gradient.double().square().sum() for gradient in gradients)
    parameters = {str(i): torch.nn.Parameter(torch.empty_like(gradient)) for i, gradient in enumerate(gradients)}
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.grad = gradient
    torch.cuda.set_sync_debug_mode("error")
    try:
        squares = local_squared_norm(parameters, Layout(), lambda _: 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert squares.item() == pytest.approx(float(wanted), rel=1e-12)


def test_rows_are_one_document_without_a_document_mask() -> None:
    config = config_of("train.device=cuda", "train.compile=false", "model.document_mask=false")
    engine = build_engine(config)
    packed, plain = (
        engine.eval_step(fed(config, batch)[:1])[0]
        for batch in (relabelled(batch_of(0)), relabelled(batch_of(0, documents=1)))
    )
    assert packed == plain


def relabelled(batch: Batch) -> Batch:
    """The same batch with a label for every token, so that only the mask changes its loss."""
    return Batch(batch.input_ids, np.roll(batch.input_ids, -1, axis=1), batch.positions, batch.document_ids)


@pytest.mark.compiles
def test_other_documents_do_not_recompile() -> None:
    config = config_of("train.device=cuda", "train.compile=true")
    engine = build_engine(config)

    def loss_and_validation(documents: int) -> tuple[float, int]:
        batch = fed(config, batch_of(documents, documents))
        return engine.train_step(batch, 1.0).loss, engine.eval_step(batch)[1]

    loss_and_validation(2)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [loss_and_validation(documents) for documents in (5, 40, 3, 60, 7, 1)]
    assert all(math.isfinite(loss) and targets > 0 for loss, targets in found)


@pytest.mark.compiles
def test_a_smaller_microbatch_recompiles() -> None:
    """The negative control of the test above."""
    config, device = config_of("train.device=cuda", "train.compile=true"), torch.device("cuda")
    engine = build_engine(config)
    engine.train_step(fed(config, batch_of(0)), 1.0)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        engine.train_step(list(split_microbatches(to_host(batch_of(1), device), 1, device)), 1.0)


def test_resume_restores_every_bit_and_continues(tmp_path: Path) -> None:
    config = config_of("train.device=cuda", "train.compile=false")
    engine = build_engine(config)
    train(engine, config, range(2))
    record = TrainState(step=2, samples=2 * ROWS, config={}, dataset="none", order="none", layout={"data": 1}, rng={})
    path = save_checkpoint(tmp_path, engine.state(), record)
    saved = {name: tensor.clone() for name, tensor in flat(engine).items()}
    uninterrupted = train(engine, config, range(2, 5))
    resumed = build_engine(config)
    started_anew = build_engine(config)
    load_checkpoint(path, resumed.state())
    resumed.sync_compute_weights()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in flat(resumed).items())
    # Flash attention's backward pass sums in varying order, which bf16 makes visible after a step.
    for (loss, norm), (wanted_loss, wanted_norm) in zip(
        train(resumed, config, range(2, 5)), uninterrupted, strict=True
    ):
        assert loss == pytest.approx(wanted_loss, rel=1e-3)
        assert norm == pytest.approx(wanted_norm, rel=1e-2)
    assert train(started_anew, config, [2])[0][0] != pytest.approx(uninterrupted[0][0], rel=1e-2)


def flat(engine: InspectableEngine) -> dict[str, torch.Tensor]:
    """Weights and optimizer state in one dictionary."""
    state = engine.state()
    slots = {
        f"{name}/{slot}": tensor
        for name, slots in state["optimizer"].items()
        if isinstance(slots, dict)
        for slot, tensor in slots.items()
    }
    return slots | {name: tensor for name, tensor in state["model"].items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.compiles
def test_pretrain_train_ends_on_the_gpu_and_resumes(
    pretrain: Callable[..., object], tiny_args: Callable[..., list[str]], tmp_path: Path
) -> None:
    args = tiny_args(tmp_path, "model.d_model=64", "train.device=auto", "train.precision=auto", "train.compile=auto")
    for kind in ("start", "resume"):
        answer = pretrain("train", *args)
        assert getattr(answer, "code", None) == 0, answer
        metrics = read_metrics(tmp_path / "metrics.jsonl")
        assert [record.step for record in metrics.steps] == list(range(1, 41))
        assert metrics.validations[-1].val_loss < 0.8 * metrics.validations[0].val_loss
        events = {event.kind: event for event in read_events(tmp_path / "events.jsonl")}
        assert events[kind].device == torch.cuda.get_device_name()
        if kind == "start":  # the same command then goes on from the checkpoint before
            shutil.rmtree(tmp_path / "checkpoints" / "step-00000040")
    assert {record.attempt for record in metrics.steps} == {1, 2}
    known = find_accelerator(torch.cuda.get_device_name()) is not None and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    assert all((record.mfu is not None) == known for record in metrics.steps)
    assert all(0 < record.mfu < 1 for record in metrics.steps if record.mfu is not None)
    assert (tmp_path / "report.html").stat().st_size > 10_000
