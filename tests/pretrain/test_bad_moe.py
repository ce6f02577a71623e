"""Settings of experts that do not go together end in exit code 2 and one line with the way out, and change nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.streaming import TensorReader
from pretrain.config.loading import load
from pretrain.inference.sample import load_trained_run
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.train.loop import Outcome

Refused = Callable[..., str]
RunTiny = Callable[..., Outcome]
TinyArgs = Callable[..., list[str]]

BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
MOE = ("model.architecture=moe", "model.moe.n_experts=8")


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.train.run.write_report", lambda _: None)


SETTINGS = {
    "more chosen than there are": (
        (*MOE, "model.moe.top_k=9"),
        "model.moe.top_k=9 is more than model.moe.n_experts=8; use at most 8",
    ),
    "groups that do not divide": (
        (*MOE, "model.moe.n_groups=3"),
        "model.moe.n_groups=3 does not divide model.moe.n_experts=8; try 1, 2, 4, 8",
    ),
    "more groups chosen than there are": (
        (*MOE, "model.moe.n_groups=2", "model.moe.top_k_groups=3"),
        "model.moe.top_k_groups=3 is more than model.moe.n_groups=2; use at most 2",
    ),
    "more chosen than in the chosen groups": (
        (*MOE, "model.moe.n_groups=4", "model.moe.top_k_groups=1", "model.moe.top_k=3"),
        "model.moe.top_k=3 is more than the 2 experts in model.moe.top_k_groups=1 of model.moe.n_groups=4 groups; "
        "raise top_k_groups or lower top_k",
    ),
    "groups of one expert": (
        (*MOE, "model.moe.n_groups=8", "model.moe.top_k_groups=4", "model.moe.score_function=sigmoid"),
        "model.moe.n_groups=8 leaves one expert a group, and the score of a group is the sum of its two best; try 1, "
        "2, 4",
    ),
    "capacity for nobody": (
        (*MOE, "model.moe.capacity_factor=0.1"),
        "model.moe.capacity_factor=0.1 is below 1 / model.moe.n_experts = 0.125: experts would drop nearly all that "
        "is sent to them; use 1 or more",
    ),
    "a policy that drops nothing": (
        (*MOE, "model.moe.drop_policy=position"),
        "model.moe.drop_policy=position has no effect without model.moe.capacity_factor; set that too, or leave "
        "model.moe.drop_policy out",
    ),
    "a rate without biases": (
        (*MOE, "model.moe.bias_update_rate=0.01"),
        "model.moe.bias_update_rate=0.01 has no effect without model.moe.expert_bias=true; set that too",
    ),
    "a scope of no loss": (
        (*MOE, "model.moe.aux_loss=0", "model.moe.aux_loss_scope=sequence"),
        "model.moe.aux_loss_scope=sequence has no effect without model.moe.aux_loss above 0; set that too",
    ),
    "sums that are 1 anyway": (
        (*MOE, "model.moe.softmax_after_top_k=true", "model.moe.normalize_top_k=false"),
        "model.moe.normalize_top_k=false has no effect without model.moe.softmax_after_top_k=false; set that too",
    ),
    "softmax of the chosen sigmoid scores": (
        (*MOE, "model.moe.score_function=sigmoid", "model.moe.softmax_after_top_k=true"),
        "model.moe.softmax_after_top_k=true needs model.moe.score_function=softmax, and it is sigmoid; change one",
    ),
    "softmax of one expert": (
        (*MOE, "model.moe.top_k=1", "model.moe.softmax_after_top_k=true"),
        "model.moe.softmax_after_top_k=true with model.moe.top_k=1 weights every expert by 1, which teaches the router "
        "nothing; change one",
    ),
    "a gate of nothing": (
        (*MOE, "model.moe.shared_expert_gate=true"),
        "model.moe.shared_expert_gate=true scales the shared experts, and model.moe.n_shared_experts=0; set it to 1 or "
        "more",
    ),
    "no layer with experts": (
        (*MOE, "model.moe.n_dense_layers=2"),
        "no layer of model.n_layers=2 has experts with model.moe.n_dense_layers=2 and model.moe.every_n_layers=1; "
        "lower one of the two",
    ),
    "no layer with experts, every third": ((*MOE, "model.moe.every_n_layers=3"), "model.moe.every_n_layers=3; lower"),
    "experts without a number": (
        ("model.architecture=moe",),
        "model.architecture=moe has experts, and model.moe.n_experts=0; set it, such as model.moe.n_experts=8",
    ),
    "experts of a dense architecture": (
        ("model.moe.n_experts=8",),
        "model.moe.n_experts=8 needs model.architecture=moe, and it is llama; change one",
    ),
    "a setting of experts in a dense model": (
        ("model.moe.top_k=4",),
        "model.moe.top_k=4 has no effect without model.moe.n_experts; set that too, or leave model.moe.top_k out",
    ),
    "biases in a dense model": (("model.moe.expert_bias=true",), "model.moe.expert_bias=true has no effect without"),
    "no width": ((*MOE, "model.moe.d_ff=0"), "model.moe.d_ff=0: input should be greater than 0"),
    "all noise": ((*MOE, "model.moe.input_jitter=1"), "model.moe.input_jitter=1: input should be less than 1"),
    "unknown scores": (
        (*MOE, "model.moe.score_function=tanh"),
        "model.moe.score_function='tanh': input should be 'softmax' or 'sigmoid'",
    ),
    "a setting in the wrong section": (("model.n_experts=8",), "model.n_experts is not a setting; did you mean"),
}


@pytest.mark.parametrize(("args", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_do_not_go_together(
    refused: Refused, tmp_path: Path, tiny_args: TinyArgs, args: tuple[str, ...], message: str
) -> None:
    assert message in refused("train", *tiny_args(tmp_path / "run", *args))


def test_settings_of_a_file_that_nobody_reads(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model: {moe: {top_k: 4}}")
    assert "model.moe.top_k=4 has no effect without model.moe.n_experts" in refused("train", tmp_path / "my.yaml")


def test_a_preset_made_dense_keeps_quiet_about_its_experts() -> None:
    """The preset's author knew what the settings are for; so did who turned the experts off."""
    config = load(None, ["model.preset=qwen3-30b-a3b", "model.architecture=llama", "model.moe.n_experts=0"]).config
    assert (config.model.moe.n_experts, config.model.moe.top_k) == (0, 8)


@pytest.fixture(scope="module")
def runs(run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense run and one with experts, biases and a capacity."""
    folder = tmp_path_factory.mktemp("runs")
    balanced = ("model.moe.expert_bias=true", "model.moe.capacity_factor=1.0", "model.moe.aux_loss=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        for name, args in {"dense": (), "moe": (*MOE, *balanced)}.items():
            run_tiny(folder / name, *args, "train.steps=4", "optim.warmup=1", "optim.schedule=constant")
    return {name: folder / name for name in ("dense", "moe")}


MOE_RUN = (*MOE, "model.moe.expert_bias=true", "model.moe.capacity_factor=1.0", "model.moe.aux_loss=0")
RESUMED = {
    "dense as experts": (
        "dense",
        MOE,
        "model.architecture: llama in the run, moe now; model.moe.n_experts: 0 in the run, 8 now; put the values back",
    ),
    "experts as dense": (
        "moe",
        (),
        "model.architecture: moe in the run, llama now; model.moe.n_experts: 8 in the run, 0 now; model.moe.aux_loss: "
        "0.0 in the run, 0.01 now; model.moe.expert_bias: True in the run, False now; model.moe.capacity_factor: 1.0 "
        "in the run, None now; put the values back",
    ),
    "fewer experts": ("moe", (*MOE_RUN, "model.moe.n_experts=4"), "model.moe.n_experts: 8 in the run, 4 now; put"),
    "another balance": ("moe", (*MOE_RUN, "model.moe.aux_loss=0.1"), "model.moe.aux_loss: 0.0 in the run, 0.1 now"),
    "more chosen": (
        "moe",
        (*MOE_RUN, "model.moe.top_k=3"),
        "model.moe.top_k: 2 in the run, 3 now; put the values back",
    ),
}


def contents(run_dir: Path) -> dict[str, bytes]:
    files = (file for file in run_dir.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


@pytest.mark.parametrize(("name", "args", "message"), RESUMED.values(), ids=RESUMED)
def test_a_run_does_not_resume_with_other_experts(
    refused: Refused, runs: dict[str, Path], tiny_args: TinyArgs, name: str, args: tuple[str, ...], message: str
) -> None:
    before = contents(runs[name])
    schedule = ("train.steps=4", "optim.warmup=1", "optim.schedule=constant")
    line = refused("train", *tiny_args(runs[name], *schedule, *args))
    assert f"run.dir={runs[name]} holds a run with other settings: " in line
    assert message in line
    assert contents(runs[name]) == before


BEGUN = {
    "dense as experts": (
        "dense",
        MOE,
        "model.architecture is llama there and moe here; model.moe.n_experts is 0 there and 8 here; leave these "
        "settings out, the model is then that run's, or let `pretrain convert upcycle` make its MLPs into experts "
        "first",
    ),
    "experts as dense": (
        "moe",
        ("model.architecture=llama", "model.moe.n_experts=0", "model.moe.expert_bias=false"),
        "model.architecture is moe there and llama here; model.moe.n_experts is 8 there and 0 here; "
        "model.moe.expert_bias is True there and False here; leave these settings out, the model is then that run's",
    ),
    "fewer experts": ("moe", ("model.moe.n_experts=4",), "model.moe.n_experts is 8 there and 4 here; leave"),
    "narrower experts": ("moe", ("model.moe.d_ff=32",), "model.moe.d_ff is 64 there and 32 here; leave"),
}


@pytest.mark.parametrize(("name", "args", "message"), BEGUN.values(), ids=BEGUN)
def test_a_run_does_not_begin_from_other_experts(
    refused: Refused,
    runs: dict[str, Path],
    tmp_path: Path,
    tiny_args: TinyArgs,
    name: str,
    args: tuple[str, ...],
    message: str,
) -> None:
    before = contents(runs[name])
    line = refused("train", *tiny_args(tmp_path / "run", f"run.init_from={runs[name]}", *args))
    assert message in line
    assert contents(runs[name]) == before


def test_the_speed_of_the_biases_may_change_on_resume_as_in_deepseek_v3(
    tmp_path: Path, run_tiny: RunTiny, runs: dict[str, Path]
) -> None:
    args = ("optim.warmup=1", "optim.schedule=constant", *MOE_RUN, "checkpoint.every=2")
    run_tiny(tmp_path / "run", *args, "train.steps=2")
    run_tiny(tmp_path / "run", *args, "train.steps=4", "model.moe.bias_update_rate=0")
    biases = [bias(tmp_path / "run", step) for step in (2, 4)]
    assert biases[0].abs().max() > 0
    assert torch.equal(*biases)
    assert not torch.equal(bias(runs["moe"], 4), biases[1])  # the same run with its old rate
    settings = [event.text for event in read_events(tmp_path / "run" / "events.jsonl") if event.kind == "settings"]
    assert "model.moe.bias_update_rate: 0.001 in the run, 0.0 now" in settings[0]


def bias(run_dir: Path, step: int) -> torch.Tensor:
    return TensorReader(run_dir / "checkpoints" / f"step-{step:08d}").read(BIAS)


def test_a_branch_may_balance_otherwise(tmp_path: Path, runs: dict[str, Path], run_tiny: RunTiny) -> None:
    """Checkpoints hold the load whatever reads it."""
    branch = (f"run.init_from={runs['moe']}", "run.init_mode=full", "train.steps=6")
    balance = ("model.moe.aux_loss=0.1", "model.moe.capacity_factor=none")
    assert run_tiny(tmp_path / "run", *branch, *balance) is Outcome.FINISHED
    assert read_metrics(tmp_path / "run" / "metrics.jsonl").steps[0].step == 5


def test_text_of_a_run_with_experts_is_that_of_its_biases_and_drops_nothing(
    runs: dict[str, Path], pretrain: Callable[..., Any]
) -> None:
    assert pretrain("generate", runs["moe"], "the model", "--max-new-tokens", 5).code == 0
    model, *_ = load_trained_run(runs["moe"], torch.device("cpu"), lambda path, problems: pytest.fail(str(problems)))
    assert torch.equal(model.saved_buffers[BIAS], bias(runs["moe"], 4))
    assert model.config.moe.capacity_factor is None
