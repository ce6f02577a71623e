"""A dense checkpoint becomes a mixture of experts that computes the same, or says why not, and trains on."""

import itertools
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.manifest import TrainState, read_manifest
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.streaming import LazyTensor, TensorReader
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.config.saved import read_config
from pretrain.convert.run import Conversion, Source, open_source, write_run
from pretrain.convert.upcycle import Upcycling, upcycle
from pretrain.inference.sample import load_trained_run
from pretrain.model.init import init_weights
from pretrain.model.transformer import Transformer
from pretrain.runs.jsonl import read_metrics
from pretrain.setup.engine import build_model
from pretrain.setup.named_checkpoint import NamedCheckpoint
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]
Pretrain = Callable[..., Any]

EXPERTS = "model.moe.n_experts=8"
SLICES = ("model.moe.d_ff=16", EXPERTS)
"""Four slices of the MLP of width 64, two copies."""


@pytest.fixture(scope="module")
def dense(run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained dense run."""
    path = tmp_path_factory.mktemp("upcycle") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        run_tiny(path, "train.steps=20")
    return path


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.train.run.write_report", lambda _: None)


@pytest.fixture(scope="module")
def source(dense: Path) -> Source:
    return open_source(str(dense))


def converted(source: Source, *settings: str) -> tuple[Transformer, Upcycling]:
    """The new model, without a checkpoint."""
    conversion, plan = upcycle(source, settings, 0.0, 0)
    model = build_model(plan.model, "sdpa", torch.device("cpu"))
    tensors = {**dict(model.named_parameters()), **model.saved_buffers}
    assert tensors.keys() == conversion.tensors.keys()
    for name, tensor in tensors.items():
        tensor.detach().copy_(conversion.tensors[name].make())
    return model, plan


def logits(model: Transformer) -> Tensor:
    """Of 4 rows of 32 tokens."""
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.logits(model(ids, model.document_mask(torch.zeros_like(ids), torch.arange(32).expand(4, -1))))


@pytest.fixture(scope="module")
def dense_logits(dense: Path) -> Tensor:
    model, *_ = load_trained_run(dense, torch.device("cpu"), lambda path, problems: pytest.fail(str(problems)))
    return logits(model)


def convert(dense: Path, target: Path, *settings: str, noise: float = 0.0, seed: int = 0) -> Upcycling:
    source = open_source(str(dense))
    conversion, plan = upcycle(source, settings, noise, seed)
    write_run(target, source, conversion)
    return plan


EXACT = {
    "copies": (EXPERTS,),
    "copies, most of them chosen": ("model.moe.n_experts=5", "model.moe.top_k=4"),
    "softmax over the chosen": (EXPERTS, "model.moe.softmax_after_top_k=true"),
    "scaled sigmoid scores and biases": (
        *(EXPERTS, "model.moe.score_function=sigmoid", "model.moe.routed_scaling_factor=2.5"),
        "model.moe.expert_bias=true",
    ),
    "slices": (*SLICES, "model.moe.top_k=4"),
    "slices of several copies": (*SLICES, "model.moe.n_experts=16", "model.moe.top_k=8"),
    "copies in groups": (*SLICES, "model.moe.top_k=4", "model.moe.n_groups=2"),
    "groups in copies": (*SLICES, "model.moe.top_k=4", "model.moe.n_groups=4", "model.moe.top_k_groups=3"),
    "shared slices": (*SLICES, "model.moe.n_experts=6", "model.moe.n_shared_experts=1", "model.moe.top_k=3"),
    "gated shared slices": (
        *(*SLICES, "model.moe.n_shared_experts=2", "model.moe.shared_expert_gate=true", "model.moe.top_k=2"),
    ),
    "first layers dense": (EXPERTS, "model.moe.n_dense_layers=1"),
    "every second layer": (*SLICES, "model.moe.every_n_layers=2", "model.moe.top_k=4"),
}


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_the_function_is_the_dense_models_to_1e5(
    source: Source, dense_logits: Tensor, settings: tuple[str, ...]
) -> None:
    model, plan = converted(source, *settings)
    assert plan.inexact_because == ""
    n_moe = sum(map(plan.moe.has_experts, range(2)))
    assert sum(name.endswith("experts.down_proj") for name, _ in model.named_parameters()) == n_moe > 0
    torch.testing.assert_close(logits(model), dense_logits, rtol=0, atol=1e-5)


INEXACT = {
    "weights that do not add up to 1": ((EXPERTS, "model.moe.normalize_top_k=false"), "normalize_top_k=false"),
    "one expert": ((EXPERTS, "model.moe.top_k=1"), "top_k=1 weights an expert by its own score"),
    "parts of a copy": ((*SLICES, "model.moe.top_k=3"), "top_k=3 is not a multiple of the 4 slices"),
    "groups across copies": (
        (*SLICES, "model.moe.n_experts=12", "model.moe.n_groups=2", "model.moe.top_k=4"),
        "n_groups=2 makes groups of 6 experts, which cut copies of 4",
    ),
}


@pytest.mark.parametrize(("settings", "reason"), INEXACT.values(), ids=INEXACT)
def test_what_does_not_keep_the_function_says_so(
    source: Source, dense_logits: Tensor, settings: tuple[str, ...], reason: str
) -> None:
    model, plan = converted(source, *settings)
    assert reason in plan.inexact_because
    assert (logits(model) - dense_logits).abs().max() > 1e-3


def test_capacity_and_noise_say_so_too(source: Source) -> None:
    _, capacity = upcycle(source, [EXPERTS, "model.moe.capacity_factor=1.0"], 0.0, 0)
    assert capacity.inexact_because == "model.moe.capacity_factor=1.0 drops what does not fit"
    assert upcycle(source, [EXPERTS], 0.5, 0)[1].inexact_because == "50% of each expert is noise"


def test_the_router_is_that_of_a_new_model_with_the_seed(source: Source) -> None:
    conversion, plan = upcycle(source, [EXPERTS], 0.0, seed=7)
    fresh = build_model(plan.model, "sdpa", torch.device("cpu"))
    init_weights(fresh, seed=7)
    routers = {name: weight for name, weight in fresh.named_parameters() if name.endswith("gate.weight")}
    assert len(routers) == 2
    assert all(torch.equal(conversion.tensors[name].make(), weight) for name, weight in routers.items())


def test_noise_replaces_the_fraction_of_hidden_features_that_was_asked_for(source: Source) -> None:
    copies, noisy, again = (
        {name: tensor.make() for name, tensor in upcycle(source, [EXPERTS], noise, 0)[0].tensors.items()}
        for noise in (0.0, 0.25, 0.25)
    )
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)
    differ = {name for name in copies if not torch.equal(copies[name], noisy[name])}
    assert differ == {f"model.layers.{i}.mlp.experts.{m}" for i in range(2) for m in ("gate_up_proj", "down_proj")}
    gate_up, down = (f"model.layers.0.mlp.experts.{matrix}" for matrix in ("gate_up_proj", "down_proj"))
    drawn_EHD = noisy[gate_up] != copies[gate_up]
    features_EF = drawn_EHD.all(-1)[:, :64]
    assert torch.equal(drawn_EHD, torch.cat([features_EF, features_EF], 1)[..., None].expand_as(drawn_EHD))
    assert torch.equal(noisy[down] != copies[down], features_EF[:, None].expand(-1, 32, -1))
    assert features_EF.sum(1).tolist() == [16] * 8
    assert len({tuple(row) for row in features_EF.tolist()}) == 8
    drawn = noisy[gate_up][:, :64][features_EF]
    assert drawn.std() == pytest.approx(copies[gate_up][0, :64].std().item(), rel=0.05)


def test_the_new_run_begins_at_the_loss_of_the_dense_one_and_beats_a_run_from_scratch(
    dense: Path, tmp_path: Path, run_tiny: RunTiny
) -> None:
    convert(dense, tmp_path / "moe", EXPERTS)
    experts = ("model.architecture=moe", EXPERTS, "train.steps=10", "optim.lr=0.003")
    run_tiny(tmp_path / "scratch", *experts)
    run_tiny(tmp_path / "on", *experts, f"run.init_from={tmp_path / 'moe'}")
    of_dense = read_metrics(dense / "metrics.jsonl").validations[-1]
    on, scratch = (read_metrics(tmp_path / name / "metrics.jsonl").validations for name in ("on", "scratch"))
    assert of_dense.step == 20
    assert (on[0].step, on[0].val_loss) == (0, pytest.approx(of_dense.val_loss, abs=1e-5))
    assert on[-1].val_loss < on[0].val_loss
    assert on[-1].val_loss < scratch[-1].val_loss - 0.3
    ancestry = read_config(tmp_path / "on" / "config.yaml").run.ancestry
    assert [(ancestor.mode, ancestor.step) for ancestor in ancestry] == [("weights", 0), ("upcycle", 20)]


def test_generation_from_the_result_says_what_the_dense_run_says(
    dense: Path, tmp_path: Path, pretrain: Pretrain
) -> None:
    out = pretrain("convert", "upcycle", dense, tmp_path / "moe", *SLICES, "model.moe.top_k=4")
    assert out.code == 0
    assert "it computes what the dense model computes" in out.out
    texts = [
        pretrain("generate", run, "the model", "--temperature", 0, "--max-new-tokens", 20).out.splitlines()[1:]
        for run in (dense, tmp_path / "moe")
    ]
    assert texts[0] == texts[1] != []


# Writing


def test_the_result_is_verified_and_says_how_it_was_made(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "moe", EXPERTS, seed=3)
    path = tmp_path / "moe" / "checkpoints" / "step-00000000"
    assert verify_checkpoint(path) == []
    manifest = read_manifest(path)
    assert manifest.conversion is not None
    assert manifest.conversion.startswith(f"upcycled from {dense}@20")
    assert manifest.conversion.endswith("seed=3 and noise_fraction=0.0")
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["moe"]


def test_a_checkpoint_outside_of_its_run_is_converted_too(dense: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(dense / "checkpoints" / "step-00000020", tmp_path / "kept")
    assert convert(kept, tmp_path / "moe", EXPERTS).inexact_because == ""
    assert (tmp_path / "moe" / "tokenizer.json").is_file()


def test_a_failed_conversion_leaves_nothing_behind(source: Source, tmp_path: Path) -> None:
    conversion, _ = upcycle(source, [EXPERTS], 0.0, 0)
    made = itertools.count()

    def on_tensor(n_bytes: int) -> None:
        if next(made) == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_run(tmp_path / "moe", source, conversion, on_tensor)
    assert next(made) == 6
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_per_tensor", [True, False])
def test_two_tensors_at_most_are_in_memory(tmp_path: Path, file_per_tensor: bool) -> None:
    """One file for all tensors, as a run saves them, is the negative control."""
    arrays: list[weakref.ref[np.ndarray[Any, Any]]] = []
    most_alive = 0

    def make() -> Tensor:
        nonlocal most_alive
        array = np.zeros(100, np.float32)  # its memory is the tensor's, so it lives as long
        arrays.append(weakref.ref(array))
        most_alive = max(most_alive, sum(ref() is not None for ref in arrays))
        return torch.from_numpy(array)

    tensors = {str(i): LazyTensor.of((100,), make) for i in range(10)}
    state = TrainState(step=0, samples=0, config={}, dataset="", order="", layout={}, rng={})
    path = save_checkpoint(tmp_path, {"model": tensors}, state, file_per_tensor=file_per_tensor)
    assert len(arrays) == 10
    assert (most_alive <= 2) == file_per_tensor
    assert TensorReader(path).read("3").tolist() == [0.0] * 100


# Wrong input

WRONG = {
    "no number of experts": ((), "model.architecture=moe has experts, and model.moe.n_experts=0; set it"),
    "more chosen than there are": (
        ("model.moe.n_experts=4", "model.moe.top_k=5"),
        "model.moe.top_k=5 is more than model.moe.n_experts=4; use at most 4",
    ),
    "width that does not divide": (
        (EXPERTS, "model.moe.d_ff=24"),
        "model.moe.d_ff=24 does not divide model.d_ff=64 into slices: use 2, 4, 8, 16, 32 or 64",
    ),
    "copies that are not whole": (
        ("model.moe.n_experts=10", "model.moe.d_ff=16"),
        "model.moe.n_experts=10 is not a multiple of the 4 slices that are routed (model.d_ff=64 / model.moe.d_ff=16): "
        "use one, such as 8",
    ),
    "copies that are not whole beside shared ones": (
        (*SLICES, "model.moe.n_shared_experts=1"),
        "n_experts=8 is not a multiple of the 3 slices that are routed (model.d_ff=64 / model.moe.d_ff=16, less "
        "model.moe.n_shared_experts=1): use one, such as 9",
    ),
    "only shared slices": (
        (*SLICES, "model.moe.n_shared_experts=4"),
        "model.moe.n_shared_experts=4 leaves none of the 4 slices of model.moe.d_ff=16 of the MLP to route: use at "
        "most 3",
    ),
    "shared copies": (
        (EXPERTS, "model.moe.n_shared_experts=1"),
        "leaves none of the 1 slices of model.moe.d_ff=64 of the MLP to route: lower model.moe.d_ff, or use no shared",
    ),
    "a setting of the dense model": (
        (EXPERTS, "model.n_layers=4"),
        "`model.n_layers=4`: upcycling takes settings of model.moe only",
    ),
    "no setting": ((EXPERTS, "8"), "`8`: upcycling takes settings of model.moe only"),
    "unknown setting": (
        (EXPERTS, "model.moe.topk=2"),
        "model.moe.topk is not a setting; did you mean model.moe.top_k?",
    ),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings(
    refused: Callable[..., str], dense: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    assert message in refused("convert", "upcycle", dense, tmp_path / "moe", *(settings or ("model.moe.top_k=2",)))


def test_what_exists_is_never_overwritten(refused: Callable[..., str], dense: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("mine", "file", "link"):
        message = refused("convert", "upcycle", dense, tmp_path / name, EXPERTS)
        assert f"{tmp_path / name} exists already and is left as it is; choose another OUT" in message


def test_sources_that_cannot_be_converted(
    refused: Callable[..., str], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (tmp_path / "out", EXPERTS)
    assert f"{tmp_path} holds no checkpoint" in refused("convert", "upcycle", tmp_path, *arguments)
    assert "there is no checkpoint of step 7; kept are 20" in refused("convert", "upcycle", f"{dense}@7", *arguments)
    convert(dense, tmp_path / "moe", EXPERTS)
    line = refused("convert", "upcycle", tmp_path / "moe", *arguments)
    assert "is a mixture of experts already (model.moe.n_experts=8); name a dense run" in line
    damaged = shutil.copytree(dense, tmp_path / "damaged")
    file = next(damaged.glob("checkpoints/*/*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    size = file.stat().st_size
    line = refused("convert", "upcycle", damaged, *arguments)
    assert f"{file} has {size} bytes instead of {size + 1}; restore it, or name another step as RUN@STEP" in line
    monkeypatch.setattr(NamedCheckpoint, "tokenizer_paths", [tmp_path / "gone.json"])
    line = refused("convert", "upcycle", dense, *arguments)
    assert f"its tokenizer is not at {tmp_path / 'gone.json'}; put it there, so that it can be copied" in line


def test_a_disk_without_room(
    refused: Callable[..., str], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    line = refused("convert", "upcycle", dense, tmp_path / "moe", EXPERTS)
    assert "the checkpoint takes 502,464 bytes, and 1,000 bytes are free" in line


def test_converted_weights_are_neither_resumed_nor_continued_with_their_optimizer(
    refused: Callable[..., str],
    pretrain: Pretrain,
    dense: Path,
    tmp_path: Path,
    tiny_args: Callable[..., list[str]],
) -> None:
    convert(dense, tmp_path / "moe", EXPERTS)
    full = (f"run.init_from={tmp_path / 'moe'}", "run.init_mode=full")
    line = refused("train", *tiny_args(tmp_path / "run", *full, "model.architecture=moe", EXPERTS))
    assert "takes over the optimizer state, and a converted checkpoint has none; set run.init_mode=weights" in line
    answer = pretrain("train", tmp_path / "moe" / "config.yaml")
    assert answer.code == 2
    assert "moe holds converted weights, which no run has trained: choose another run.dir, and start from" in answer.err
    assert verify_checkpoint(tmp_path / "moe" / "checkpoints" / "step-00000000") == []


def test_a_conversion_writes_tensors_of_the_declared_shape(source: Source, tmp_path: Path) -> None:
    conversion, _ = upcycle(source, [EXPERTS], 0.0, 0)
    wrong = dict(conversion.tensors) | {"lm_head.weight": LazyTensor.of((3,), lambda: torch.zeros(4))}
    with pytest.raises(ValueError, match=r"made torch.float32\[4\] for torch.float32\[3\]"):
        write_run(tmp_path / "moe", source, Conversion("upcycle", conversion.config, wrong, ""))
