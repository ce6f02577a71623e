"""A pipeline matches one process in losses, gradients and steps: every schedule, unequal stages, tied embeddings.

No number of stages divides the layers. Tests take two steps, so that the second uses the weights of the first.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from workers import WorkerPool

from parallel.engine import Microbatch, MicrobatchLoss
from parallel.fsdp import apply_fsdp
from parallel.layout import Layout
from parallel.local import to_local
from parallel.mesh import build_mesh
from parallel.pipeline import zero_bubble
from parallel.pipeline.runner import PipelineRunner
from parallel.pipeline.schedule import LayerCosts, assign_layers, stages_of_rank
from parallel.pipeline.stage import StageModule
from parallel.pipeline.tied_embedding import TiedEmbedding
from parallel.pipeline.torch_schedules import describe_pipeline, layout_bubble_fraction, schedule_actions
from pretrain.config import ModelConfig
from pretrain.model.architectures.llama import Llama
from pretrain.model.init import init_weights
from pretrain.model.loss import LossSum

V, S, D = 64, 12, 16
Z_LOSS, LR = 1e-3, 0.1
CONFIG = ModelConfig(vocab_size=V, n_layers=5, d_model=D, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=S, init_std=0.3)
STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "interleaved_zero_bubble": 2, "zbv": 2}
BREAKAGES = ("stale weights in a stage", "scale left out", "tied gradients not summed")


@dataclass
class Result:
    """Loss sums of each step, gradients of the last step, and a validation loss, of a rank or of one process."""

    losses: list[list[float]]
    gradients: dict[str, Tensor]
    validation: float


def forward_step(chunk: nn.Module, received: Tensor | None, microbatch: Microbatch) -> Tensor | MicrobatchLoss:
    assert isinstance(chunk, Llama)
    mask = chunk.document_mask(microbatch.document_ids, microbatch.positions)
    x = microbatch.input_ids if received is None else received
    return chunk.loss(x, microbatch.labels, mask, z_loss=Z_LOSS) if chunk.is_last else chunk(x, mask)


def microbatches(n: int, b: int = 2) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(V, (n, b, S + 1), generator=generator)
    positions = torch.arange(S).expand(b, S)
    labels = ids[:, :, 1:].clone()
    labels[::2, 0, : S // 2] = -100
    return [
        Microbatch(ids[i, :, :-1], labels[i], positions, torch.zeros_like(positions), int((labels[i] >= 0).sum()))
        for i in range(n)
    ]


def test_a_stage_sums_losses_in_fp64() -> None:
    """0.1 nats 20,000 times: a running sum in fp32 would be off by 1e-5."""
    many, tenth = 20_000, torch.tensor(0.1)
    stage = StageModule(nn.Identity(), lambda *_: LossSum(tenth, tenth, tenth / 2), Layout())
    stage.begin_step([Microbatch(*(tenth,) * 4, n_targets=1)] * many, torch.ones(()))
    for _ in range(many):
        stage()
    assert stage.loss_sums is not None
    assert [total.item() for total in stage.loss_sums] == pytest.approx(
        [many * tenth.item(), many * tenth.item() / 2], rel=1e-12
    )


def scale_of(batch: list[Microbatch]) -> Tensor:
    return torch.tensor(1 / sum(microbatch.n_targets for microbatch in batch))


def chunk_of(config: ModelConfig, layers: range) -> Llama:
    """A chunk with the weights of the full model."""
    full, chunk = Llama(config), Llama(config, layers=layers)
    init_weights(full, seed=0)
    chunk.load_state_dict({name: value for name, value in full.state_dict().items() if name in chunk.state_dict()})
    return chunk


def loss_of(model: Llama, microbatch: Microbatch) -> LossSum:
    loss = forward_step(model, None, microbatch)
    assert isinstance(loss, LossSum)
    return loss


def sgd_step(module: nn.Module) -> dict[str, Tensor]:
    """Take an SGD step. Returns the full gradients."""
    gradients = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                full = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                gradients[name.removeprefix("chunk.")] = full.clone()
                parameter -= LR * parameter.grad
                parameter.grad = None
    return gradients


def run_single_process(config: ModelConfig, steps: list[list[Microbatch]]) -> Result:
    model = chunk_of(config, range(config.n_layers))
    losses: list[list[float]] = []
    for batch in steps:
        sums = [loss_of(model, microbatch) for microbatch in batch]
        for each in sums:
            (each.total * scale_of(batch)).backward()
        losses.append([sum(float(each.cross_entropy) for each in sums), sum(float(each.z_loss) for each in sums)])
        gradients = sgd_step(model)
    with torch.no_grad():
        validation = sum(float(loss_of(model, microbatch).cross_entropy) for microbatch in validation_set())
    return Result(losses, gradients, validation)


def validation_set() -> list[Microbatch]:
    return microbatches(7, b=3)


def config_of(layout: Layout, tie: bool) -> ModelConfig:
    return CONFIG.model_copy(
        update={"tie_embeddings": tie, "n_layers": 5 if layout.n_stages < 5 else layout.n_stages + 1}
    )


def run_pipeline_rank(
    layout: Layout,
    tie: bool,
    counts: list[int],
    broken: str | None = None,
    fsdp: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Run steps of so many microbatches on one pipeline rank."""
    config = config_of(layout, tie)
    mesh = build_mesh(layout, "cpu")
    ranges = assign_layers(LayerCosts((1.0,) * config.n_layers), layout.n_stages)
    local_stages = stages_of_rank(mesh.get_local_rank("pipeline"), layout)
    stages = {i: StageModule(chunk_of(config, ranges[i]), forward_step, layout) for i in local_stages}
    chunks = {i: stage.chunk for i, stage in stages.items()}
    if fsdp:
        for stage in stages.values():
            apply_fsdp(stage, stage.chunk.fsdp_units, mesh, layout, dtype)
            assert isinstance(stage, FSDPModule)
    pipeline = PipelineRunner(
        stages, layout, mesh["pipeline"].get_group(), device=torch.device("cpu"), dtype=dtype, d_model=D
    )
    tied = TiedEmbedding.of(chunks, layout, mesh)
    pipeline.evaluate(microbatches(1))  # a run evaluates before its first step; that must leave no trace
    losses, gradients = [], dict[str, Tensor]()
    for number, n in enumerate(counts):
        batch = microbatches(n)[mesh.get_local_rank("shard") :: layout.shard]
        scale = torch.tensor(1.0) if broken == "scale left out" else scale_of(microbatches(n))
        losses.append([float(total) for total in pipeline.train(batch, scale)])
        if tied is not None and broken != "tied gradients not summed":
            tied.sum_gradients()
        gradients = {}
        for i, stage in stages.items():
            if broken == "stale weights in a stage" and i == 1 and number == 0:
                stage.zero_grad()
            gradients |= sgd_step(stage)
        copy_tied_parameter(tied)
    return Result(losses, gradients, float(pipeline.evaluate(validation_set())))


def copy_tied_parameter(tied: TiedEmbedding | None) -> None:
    """If one rank holds both copies of a parameter, copy the first to the second, as the engine does."""
    if tied is not None and len(tied.holders) == 2:
        first, last = (to_local(chunk.get_parameter(tied.name).detach()) for chunk in tied.holders)
        last.copy_(first)


def assert_same(ranks: list[Result], one: Result, shards: int = 1) -> None:
    torch.testing.assert_close(
        torch.tensor([r.losses for r in ranks]).sum(0), torch.tensor(one.losses), rtol=1e-6, atol=0
    )
    assert sum(rank.validation for rank in ranks) == pytest.approx(one.validation * shards, rel=1e-6)
    assert {name for rank in ranks for name in rank.gradients} == set(one.gradients)
    for rank in ranks:
        for name, gradient in rank.gradients.items():
            assert distance(gradient, one.gradients[name]) < 5e-6, name


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def layout_of(schedule: str, p: int = 2, shard: int = 1, zero: int = 2) -> Layout:
    return Layout(pipeline=p, shard=shard, zero=zero, schedule=schedule, stages_per_rank=STAGES_PER_RANK[schedule])


def compare(workers: WorkerPool, layout: Layout, tie: bool, broken: str | None = None, fsdp: bool = False) -> None:
    """Two steps, the second of more microbatches."""
    counts = [4, 8]
    ranks = workers.run(run_pipeline_rank, layout.world_size, layout, tie, counts, broken, fsdp)
    assert_same(
        ranks, run_single_process(config_of(layout, tie), [microbatches(n) for n in counts]), shards=layout.shard
    )


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
def test_losses_and_gradients_match_one_process(workers: WorkerPool, schedule: str) -> None:
    compare(workers, layout_of(schedule), tie=False)


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
@pytest.mark.parametrize("p", [2, 4])
def test_losses_and_gradients_match_with_tied_embeddings(workers: WorkerPool, schedule: str, p: int) -> None:
    compare(workers, layout_of(schedule, p), tie=True)


def test_both_copies_of_a_tied_embedding_get_the_same_bits(workers: WorkerPool) -> None:
    first, last = workers.run(run_pipeline_rank, 2, layout_of("1f1b"), True, [4])
    assert torch.equal(first.gradients["model.embed_tokens.weight"], last.gradients["model.embed_tokens.weight"])


@pytest.mark.parametrize(("schedule", "zero"), [(schedule, zero) for schedule in STAGES_PER_RANK for zero in (2, 3)])
def test_losses_and_gradients_match_when_fsdp_shards_the_stages(workers: WorkerPool, schedule: str, zero: int) -> None:
    compare(workers, layout_of(schedule, shard=2, zero=zero), tie=True, fsdp=True)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("broken", BREAKAGES)
def test_a_broken_pipeline_is_detected(workers: WorkerPool, broken: str, schedule: str) -> None:
    with pytest.raises(AssertionError):
        compare(workers, layout_of(schedule), tie=True, broken=broken)


def gradients_of_schedules(schedules: list[str], dtype: torch.dtype, broken: bool = False) -> list[dict[str, Tensor]]:
    """Gradients of the chunks on this rank, under FSDP, for each schedule in turn."""
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(zero_bubble, "_accumulate_in_reduction_dtype", lambda _: None)
        return [
            run_pipeline_rank(layout_of(schedule), False, [8], fsdp=True, dtype=dtype).gradients
            for schedule in schedules
        ]


@pytest.mark.parametrize("broken", [False, True])
def test_in_bf16_zero_bubble_gives_the_gradients_of_1f1b(workers: WorkerPool, broken: bool) -> None:
    """Both sum microbatches in fp32. Otherwise they would differ by rounding to bf16."""
    ranks = workers.run(gradients_of_schedules, 2, ["1f1b", "interleaved_zero_bubble", "zbv"], torch.bfloat16, broken)
    ours, *others = [{name: gradient for rank in ranks for name, gradient in rank[i].items()} for i in range(3)]
    for theirs in others:
        errors = [distance(theirs[name], ours[name]) for name in ours]
        assert max(errors) > 1e-3 if broken else max(errors) == 0


@pytest.mark.parametrize(("schedule", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 4), (4, 16), (8, 64)])
def test_bubble_fraction_is_the_papers_formula(schedule: str, v: int, p: int, m: int) -> None:
    layout = Layout(pipeline=p, schedule=schedule, stages_per_rank=v)
    assert layout_bubble_fraction(layout, m) == pytest.approx((p - 1) / (v * m + p - 1))


def test_zero_bubble_has_less_than_half_the_bubble_of_interleaved() -> None:
    interleaved, zero_bubble, v = (
        layout_bubble_fraction(layout_of(s, 8), 64) for s in ("interleaved", "interleaved_zero_bubble", "zbv")
    )
    assert v < interleaved / 2
    assert zero_bubble < interleaved / 2


@pytest.mark.parametrize("schedule", STAGES_PER_RANK)
def test_every_rank_runs_every_pass_of_its_stages_once(schedule: str) -> None:
    layout = layout_of(schedule, 4)
    for rank, actions in schedule_actions(layout, 8).items():
        halves = [
            (kind, a.stage, a.microbatch)
            for a in actions
            for kind in (("input", "weight") if a.kind == "backward" else (a.kind,))
        ]
        assert sorted(halves) == sorted(
            (k, s, i) for k in ("forward", "input", "weight") for s in stages_of_rank(rank, layout) for i in range(8)
        )


def test_a_pipeline_is_described_in_one_line() -> None:
    line = describe_pipeline(layout_of("1f1b", 4), LayerCosts((1.0,) * 11, last=1.5), 16)
    assert line == "4 stages of 3+3+3+2 layers on 4 ranks, 1f1b, 16 microbatches a step: ranks wait 23% of it"
