"""A pipeline computes what one process computes: losses, gradients, steps; under every schedule, with unequal stages and tied embeddings.

Everywhere: no number of stages divides the layers, and there are two steps, so that the second sees what the first did to the weights.
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
from parallel.gradients import local
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.pipeline import zero_bubble
from parallel.pipeline.runner import (
    PipelineRunner,
    StageModule,
    TiedEmbedding,
    describe_pipeline,
    layout_bubble_fraction,
    schedule_actions,
)
from parallel.pipeline.schedule import assign_layers, stages_of_rank
from pretrain.config import ModelConfig
from pretrain.model.architectures.llama import Llama
from pretrain.model.init import init_weights
from pretrain.model.loss import LossSum as Sums

V, S, D = 64, 12, 16
Z_LOSS, LR = 1e-3, 0.1
CONFIG = ModelConfig(vocab_size=V, n_layers=5, d_model=D, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=S, init_std=0.3)
HELD = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "interleaved_zero_bubble": 2, "zbv": 2}
BREAKAGES = ("stale weights in a stage", "scale left out", "tied gradients not summed")


@dataclass
class Result:
    """What a rank, or the one process, found: of each step the sums of the loss, of the last one the gradients; then a validation."""

    losses: list[list[float]]
    gradients: dict[str, Tensor]
    validation: float


def forward_step(part: nn.Module, received: Tensor | None, microbatch: Microbatch) -> Tensor | MicrobatchLoss:
    assert isinstance(part, Llama)
    mask = part.document_mask(microbatch.document_ids, microbatch.positions)
    x = microbatch.input_ids if received is None else received
    return part.loss(x, microbatch.labels, mask, z_loss=Z_LOSS) if part.is_last else part(x, mask)


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


def test_a_stage_adds_up_the_losses_of_many_microbatches_in_fp64() -> None:
    """0.1 nats 20,000 times; a running sum in fp32 is 1e-5 off."""
    many, tenth = 20_000, torch.tensor(0.1)
    stage = StageModule(nn.Identity(), lambda *_: Sums(tenth, tenth, tenth / 2), Layout())
    stage.begin([Microbatch(*(tenth,) * 4, n_targets=1)] * many, torch.ones(()))
    for _ in range(many):
        stage()
    assert stage.sums is not None
    assert [total.item() for total in stage.sums] == pytest.approx(
        [many * tenth.item(), many * tenth.item() / 2], rel=1e-12
    )


def scale_of(batch: list[Microbatch]) -> Tensor:
    return torch.tensor(1 / sum(microbatch.n_targets for microbatch in batch))


def part_of(config: ModelConfig, layers: range) -> Llama:
    """With the weights of the whole model."""
    whole, part = Llama(config), Llama(config, layers=layers)
    init_weights(whole, seed=0)
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in part.state_dict()})
    return part


def step(part: nn.Module) -> dict[str, Tensor]:
    """SGD; returns the gradients that it used, in full."""
    gradients = {}
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                full = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                gradients[name.removeprefix("part.")] = full.clone()
                parameter -= LR * parameter.grad
                parameter.grad = None
    return gradients


def alone(config: ModelConfig, steps: list[list[Microbatch]]) -> Result:
    model = part_of(config, range(config.n_layers))
    losses: list[list[float]] = []
    for batch in steps:
        sums = [forward_step(model, None, microbatch) for microbatch in batch]
        for each in sums:
            assert isinstance(each, Sums)
            (each.total * scale_of(batch)).backward()
        losses.append([sum(float(each.cross_entropy) for each in sums), sum(float(each.z_loss) for each in sums)])  # type: ignore[union-attr]  # all are Sums
        gradients = step(model)
    with torch.no_grad():
        validation = sum(float(forward_step(model, None, microbatch).cross_entropy) for microbatch in validation_set())  # type: ignore[union-attr]  # as above
    return Result(losses, gradients, validation)


def validation_set() -> list[Microbatch]:
    return microbatches(7, b=3)


def config_of(layout: Layout, tie: bool) -> ModelConfig:
    return CONFIG.model_copy(
        update={"tie_embeddings": tie, "n_layers": 5 if layout.n_stages < 5 else layout.n_stages + 1}
    )


def in_stages(
    layout: Layout,
    tie: bool,
    counts: list[int],
    broken: str | None = None,
    fsdp: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """What a rank of a pipeline finds, in steps of so many microbatches."""
    config = config_of(layout, tie)
    mesh = build_mesh(layout, "cpu")
    ranges = assign_layers(config.n_layers, layout.n_stages, first_cost=0, last_cost=0)
    held = stages_of_rank(mesh.get_local_rank("pipeline"), layout)
    stages = {i: StageModule(part_of(config, ranges[i]), forward_step, layout) for i in held}
    parts = {i: stage.part for i, stage in stages.items()}
    if fsdp:
        for stage in stages.values():
            apply_fsdp(stage, stage.part.fsdp_units, mesh, layout, dtype)
            assert isinstance(stage, FSDPModule)
    pipeline = PipelineRunner(
        stages, layout, mesh["pipeline"].get_group(), device=torch.device("cpu"), activation=dtype, width=D
    )
    tied = TiedEmbedding.of(parts, layout, mesh)
    pipeline.evaluate(microbatches(1))  # as before the first step of a run; nothing of it may stay
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
            gradients |= step(stage)
        follow(parts, tied)
    return Result(losses, gradients, float(pipeline.evaluate(validation_set())))


def follow(parts: dict[int, nn.Module], tied: TiedEmbedding | None) -> None:
    """Where one rank holds both copies of a parameter, the second follows the first, as in the engine."""
    if tied is not None and len(tied.copies) == 2:
        first, last = (local(part.get_parameter(tied.name).detach()) for part in tied.copies)
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
    return Layout(pipeline=p, shard=shard, zero=zero, schedule=schedule, stages_per_rank=HELD[schedule])


def compare(workers: WorkerPool, layout: Layout, tie: bool, broken: str | None = None, fsdp: bool = False) -> None:
    """Two steps, the second of more microbatches."""
    counts = [4, 8]
    ranks = workers.run(in_stages, layout.world_size, layout, tie, counts, broken, fsdp)
    assert_same(ranks, alone(config_of(layout, tie), [microbatches(n) for n in counts]), shards=layout.shard)


@pytest.mark.parametrize("schedule", HELD)
def test_losses_and_gradients_are_those_of_one_process(workers: WorkerPool, schedule: str) -> None:
    compare(workers, layout_of(schedule), tie=False)


@pytest.mark.parametrize("schedule", HELD)
@pytest.mark.parametrize("p", [2, 4])
def test_losses_and_gradients_are_those_of_one_process_with_tied_embeddings(
    workers: WorkerPool, schedule: str, p: int
) -> None:
    compare(workers, layout_of(schedule, p), tie=True)


def test_both_copies_of_a_tied_embedding_get_the_same_bits(workers: WorkerPool) -> None:
    first, last = workers.run(in_stages, 2, layout_of("1f1b"), True, [4])
    assert torch.equal(first.gradients["model.embed_tokens.weight"], last.gradients["model.embed_tokens.weight"])


@pytest.mark.parametrize(("schedule", "zero"), [(schedule, zero) for schedule in HELD for zero in (2, 3)])
def test_losses_and_gradients_are_the_same_when_stages_are_sharded_too(
    workers: WorkerPool, schedule: str, zero: int
) -> None:
    compare(workers, layout_of(schedule, shard=2, zero=zero), tie=True, fsdp=True)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("broken", BREAKAGES)
def test_a_broken_pipeline_is_noticed(workers: WorkerPool, broken: str, schedule: str) -> None:
    with pytest.raises(AssertionError):
        compare(workers, layout_of(schedule), tie=True, broken=broken)


def of_schedules(schedules: list[str], dtype: torch.dtype, broken: bool = False) -> list[dict[str, Tensor]]:
    """Gradients of each schedule in turn, of the parts on this rank, from parameters sharded by FSDP."""
    with pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(zero_bubble, "_sum_as_reduced", lambda _: None)
        return [in_stages(layout_of(schedule), False, [8], fsdp=True, dtype=dtype).gradients for schedule in schedules]


@pytest.mark.parametrize("broken", [False, True])
def test_in_bf16_zero_bubble_gives_the_gradients_of_1f1b(workers: WorkerPool, broken: bool) -> None:
    """Both sum microbatches in fp32; without that they differ by what bf16 rounds."""
    ranks = workers.run(of_schedules, 2, ["1f1b", "interleaved_zero_bubble", "zbv"], torch.bfloat16, broken)
    ours, *others = [{name: gradient for rank in ranks for name, gradient in rank[i].items()} for i in range(3)]
    for theirs in others:
        errors = [distance(theirs[name], ours[name]) for name in ours]
        assert max(errors) > 1e-3 if broken else max(errors) == 0


@pytest.mark.parametrize(("schedule", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 4), (4, 16), (8, 64)])
def test_ranks_wait_as_the_papers_say(schedule: str, v: int, p: int, m: int) -> None:
    layout = Layout(pipeline=p, schedule=schedule, stages_per_rank=v)
    assert layout_bubble_fraction(layout, m) == pytest.approx((p - 1) / (v * m + p - 1))


def test_zero_bubble_waits_less_than_half_as_long_as_interleaved() -> None:
    interleaved, zero_bubble, v = (
        layout_bubble_fraction(layout_of(s, 8), 64) for s in ("interleaved", "interleaved_zero_bubble", "zbv")
    )
    assert v < interleaved / 2
    assert zero_bubble < interleaved / 2


@pytest.mark.parametrize("schedule", HELD)
def test_every_rank_does_every_pass_of_its_stages_once(schedule: str) -> None:
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


def test_the_pipeline_of_a_run_is_told_in_one_line() -> None:
    line = describe_pipeline(layout_of("1f1b", 4), 11, 16, first_cost=0, last_cost=1.5)
    assert line == "4 stages of 3+3+3+2 layers on 4 ranks, 1f1b, 16 microbatches a step: ranks wait 23% of it"
