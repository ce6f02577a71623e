"""What a user watches of the experts: the numbers of a step, counts by source, and the lines they are written to."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.cli.demo_steps import demo_config, moe_demo_config
from pretrain.config.model import MoeConfig
from pretrain.runs.jsonl import RecordFile, read_metrics
from pretrain.runs.routing import expert_counts, kl_to_uniform, load_over_mean, step_routing
from pretrain.runs.schema import RoutingStatistics, SourceLoss, StepRecord, ValidationRecord
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]

# Two layers with experts after a dense one; 4 experts, 2 of them for each of 8 tokens. After the counts come sums over
# the tokens: weighted auxiliary loss, weighted z-loss, entropy in nats, dropped assignments.
ROUTING = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [4, 4, 4, 4, 8 * 0.01, 8 * 0.002, 8 * math.log(4), 0],
        [8, 6, 2, 0, 8 * 0.015, 8 * 0.004, 8 * math.log(2), 4],
    ],
    dtype=np.float64,
)
ALL_ON = MoeConfig(n_experts=4, top_k=2, n_dense_layers=1, router_z_loss=1e-3, capacity_factor=1.0)


def test_the_numbers_of_a_hand_made_step() -> None:
    aux_loss, router_z_loss, statistics = step_routing(ROUTING, 8, ALL_ON)
    assert aux_loss == pytest.approx(0.025, rel=1e-12)
    assert router_z_loss == pytest.approx(0.006, rel=1e-12)
    assert statistics == RoutingStatistics(
        layers=(1, 2),
        load_max=(1.0, 2.0),
        dead=(0, 1),
        entropy=(1.0, 0.5),
        dropped=(0.0, 0.25),
        aux_loss=(1.0, 1.5),
        router_z_loss=(2.0, 4.0),
    )


def test_what_is_off_is_left_out() -> None:
    plain = ALL_ON.model_copy(update={"router_z_loss": 0.0, "capacity_factor": None, "aux_loss": 0.0})
    aux_loss, router_z_loss, statistics = step_routing(ROUTING, 8, plain)
    assert (aux_loss, router_z_loss) == (None, None)
    assert statistics is not None
    assert set(statistics.model_dump(exclude_none=True)) == {"layers", "load_max", "dead", "entropy"}


def test_a_layer_without_tokens_has_no_load_and_no_division_by_zero() -> None:
    with np.errstate(all="raise"):
        statistics = step_routing(np.zeros((3, 8)), 1, ALL_ON).statistics
    assert statistics is not None
    assert (statistics.load_max, statistics.dead) == ((0.0, 0.0), (4, 4))


def test_counts_are_exact_and_by_layer() -> None:
    assert expert_counts(ROUTING, ALL_ON) == {1: (4, 4, 4, 4), 2: (8, 6, 2, 0)}


def test_the_divergence_from_an_even_load_is_zero_if_even_and_log_e_if_one_expert_has_all() -> None:
    counts = [[5, 5, 5, 5], [0, 20, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(kl_to_uniform(counts), [0, math.log(4), math.log(2), 0], atol=1e-15)
    np.testing.assert_allclose(load_over_mean(counts), [[1] * 4, [0, 4, 0, 0], [2, 2, 0, 0], [0] * 4])


def test_the_line_of_a_step_is_short_for_94_layers_of_128_experts() -> None:
    counts = np.random.default_rng(0).poisson(1000, (94, 132)).astype(float)
    moe = MoeConfig(n_experts=128, top_k=8, router_z_loss=1e-3, capacity_factor=1.25)
    step = step_routing(counts, 16_000, moe)
    record = StepRecord(
        step=1, samples=1, tokens=1, loss=1.0, lr=1.0, grad_norm=1.0, tokens_per_s=1.0, step_s=1.0, time=1.0, attempt=1,
        aux_loss=step.aux_loss, router_z_loss=step.router_z_loss, routing=step.statistics,
    )  # fmt: skip
    assert len(record.line()) < 5000
    assert len(json.dumps(counts[:, :128].tolist())) > 50_000  # the counts of all experts


def test_records_with_experts_are_read_back_and_older_files_still_load(tmp_path: Path) -> None:
    by_source = {"web": SourceLoss(loss=2.0, tokens=8, expert_counts=expert_counts(ROUTING, ALL_ON))}
    validation = ValidationRecord(step=1, val_loss=2.0, val_tokens=8, by_source=by_source, time=2.0)
    aux_loss, router_z_loss, statistics = step_routing(ROUTING, 8, ALL_ON)
    old = {"step": 1, "samples": 1, "tokens": 8, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 8.0}
    plain = StepRecord.model_validate({**old, "step_s": 1.0, "time": 1.0, "attempt": 1})
    losses = {"aux_loss": aux_loss, "router_z_loss": router_z_loss}
    record = plain.model_copy(update={"step": 2, "routing": statistics, **losses})
    with RecordFile(tmp_path / "metrics.jsonl") as file:
        for each in (plain, record, validation):
            file.append(each)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(lines[1])) - set(json.loads(lines[0])) == {"routing", "aux_loss", "router_z_loss"}
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.steps == [plain, record]
    assert metrics.validations == [validation]
    older = ValidationRecord.model_validate_json('{"step":1,"val_loss":2,"val_tokens":8,"time":1,'
                                                 '"by_source":{"web":{"loss":2,"tokens":8}}}')  # fmt: skip
    assert older.by_source["web"].expert_counts is None


def test_a_run_counts_every_choice_of_every_token(run_tiny: RunTiny, tmp_path: Path) -> None:
    """A batch has 4 x 32 tokens; a validation of 2 x 4 sequences as many as it predicts, and padding counts nowhere."""
    experts = (
        "model.architecture=moe",
        "model.moe.n_experts=4",
        "model.moe.n_dense_layers=1",
        "train.steps=2",
        "optim.warmup=0",
    )
    run_tiny(tmp_path / "moe", *experts, "train.micro_batch_size=3", "model.moe.capacity_factor=0.5", "eval.every=2")
    metrics = read_metrics(tmp_path / "moe" / "metrics.jsonl")
    for record in metrics.steps:
        assert record.routing is not None
        assert record.routing.layers == (1,)
        assert record.routing.aux_loss is not None
        assert record.aux_loss == pytest.approx(0.01 * record.routing.aux_loss[0], abs=1e-6)
        assert record.routing.dropped is not None
        assert record.routing.dropped[0] >= 0.5 - 1e-9  # half of the assignments have no room at all
        assert 1 <= record.routing.load_max[0] <= 2
    assert metrics.steps[0].routing is not None
    assert metrics.steps[0].routing.aux_loss == pytest.approx((1.0,), abs=1e-4)  # before any step the load is even
    assert metrics.steps[0].routing.entropy == pytest.approx((1.0,), abs=0.02)  # fresh routers prefer no expert
    for validation in metrics.validations:
        (source,) = validation.by_source.values()
        assert source.expert_counts is not None
        assert sum(source.expert_counts[1]) == 2 * 8 * 32
    run_tiny(tmp_path / "dense", "train.steps=2", "optim.warmup=0")
    lines = (tmp_path / "dense" / "metrics.jsonl").read_text()
    assert not any(word in lines for word in ("routing", "aux", "router", "expert"))


def test_the_demo_with_experts_reads_three_kinds_of_text_that_are_installed(tmp_path: Path) -> None:
    config = moe_demo_config(tmp_path)
    assert config.model.moe.n_experts == 8
    assert (
        [source.name for source in config.data.sources]
        == ["python", "cpp", "english"]
        == [*config.data.mixture.weights]
    )
    for source, pattern in zip(config.data.sources, ("*.py", "*.h", ""), strict=True):
        for path in map(Path, source.paths):
            assert any(path.rglob(pattern) if pattern else Path("/").glob(str(path)[1:])), path
    dense = demo_config(tmp_path)
    assert [source.name for source in dense.data.sources] == ["stdlib"]
    assert dense.model.moe.n_experts == 0
    changed = {"data", "model"}
    assert config.model_dump(exclude=changed) == dense.model_dump(exclude=changed)
