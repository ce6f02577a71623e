"""Averaging key/value heads: the numbers, and exactness where the heads of a group are equal."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.streaming import TensorReader
from pretrain.config import ModelConfig
from pretrain.convert.gqa import average_heads, group_queries
from pretrain.convert.run import open_source, write_run
from pretrain.runs.jsonl import read_metrics
from pretrain.setup.engine import build_model
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]

HEADS = ("model.n_heads=4", "model.n_kv_heads=4", "model.qkv_bias=true")
HEAD_DIM = 8


@pytest.fixture(scope="module", params=["model.qk_norm=full", "model.architecture=moe"])
def mha(request: pytest.FixtureRequest, run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with four key/value heads."""
    path = tmp_path_factory.mktemp("gqa") / "mha"
    moe = ("model.moe.n_experts=4",) if "moe" in request.param else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        run_tiny(path, *HEADS, request.param, *moe, "train.steps=5", "optim.warmup=1")
    return path


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.train.run.write_report", lambda _: None)


def convert(source: Path, target: Path, n_kv_heads: int) -> TensorReader:
    opened = open_source(str(source))
    write_run(target, opened, group_queries(opened, n_kv_heads))
    return TensorReader(target / "checkpoints" / "step-00000000")


def logits(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    """Of 4 rows of 32 tokens, by a model with these weights."""
    model = build_model(config, "sdpa", torch.device("cpu"))
    for name, tensor in {**dict(model.named_parameters()), **model.saved_buffers}.items():
        tensor.detach().copy_(tensors[name])
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.logits(model(ids, model.document_mask(torch.zeros_like(ids), torch.arange(32).expand(4, -1))))


def test_each_new_head_is_the_mean_of_its_group_and_all_else_is_copied(mha: Path, tmp_path: Path) -> None:
    new = convert(mha, tmp_path / "gqa", 2)
    old = TensorReader(mha / "checkpoints" / "step-00000005")
    averaged = {name for name in old.shapes if not torch.equal(old.read(name), new.read(name))}
    assert averaged == {name for name in old.shapes if is_per_head(name, old.shapes)}
    assert len(averaged) in (2 * 4, 2 * 5)
    for name in averaged:
        before, after = old.read(name), new.read(name)
        assert len(after) == 2 * HEAD_DIM
        for head, row in ((0, 0), (0, 7), (1, 3)):
            by_hand = (before[2 * head * HEAD_DIM + row] + before[(2 * head + 1) * HEAD_DIM + row]) / 2
            torch.testing.assert_close(after[head * HEAD_DIM + row], by_hand)


def is_per_head(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    module = name.split(".")[-2]
    return module in ("k_proj", "v_proj") or (module == "k_norm" and shapes[name] != (HEAD_DIM,))


def test_equal_heads_keep_the_function_and_others_do_not(mha: Path) -> None:
    source = open_source(str(mha))
    mha_config = source.config.model
    conversion = group_queries(source, 2)
    two = {name: tensor.make() for name, tensor in conversion.tensors.items()}
    old = {name: source.tensors.read(name) for name in source.tensors.shapes}
    of_two = logits(conversion.config.model, two)
    assert (of_two - logits(mha_config, old)).abs().max() > 1e-3
    four = {
        name: tensor.unflatten(0, (2, HEAD_DIM)).repeat_interleave(2, 0).flatten(0, 1)
        if is_per_head(name, source.tensors.shapes)
        else tensor
        for name, tensor in two.items()
    }
    torch.testing.assert_close(logits(mha_config, four), of_two, rtol=0, atol=1e-5)
    for name in four:
        if is_per_head(name, source.tensors.shapes):
            assert torch.equal(average_heads(four[name], 2, HEAD_DIM), two[name])


def test_training_goes_on_from_the_result(mha: Path, tmp_path: Path, run_tiny: RunTiny) -> None:
    convert(mha, tmp_path / "gqa", 1)
    model = open_source(str(tmp_path / "gqa")).config.model
    assert (model.n_heads, model.n_kv_heads) == (4, 1)
    shape = (*HEADS, f"model.architecture={model.architecture}", f"model.moe.n_experts={model.moe.n_experts}")
    args = ("train.steps=10", "model.n_kv_heads=1", f"model.qk_norm={model.qk_norm}".lower())
    run_tiny(tmp_path / "on", *shape, *args, f"run.init_from={tmp_path / 'gqa'}")
    losses = [record.val_loss for record in read_metrics(tmp_path / "on" / "metrics.jsonl").validations]
    assert losses[-1] < losses[0] < 5.7  # log(300)


WRONG = {
    "no fewer": ("4", "--n-kv-heads=4 is not below model.n_kv_heads=4 of {mha}@5; use 1 or 2"),
    "not a divisor": ("3", "--n-kv-heads=3 does not divide model.n_kv_heads=4 of {mha}@5; use 1 or 2"),
    "none": ("0", "Invalid value for '--n-kv-heads'"),
}


@pytest.mark.parametrize(("n_kv_heads", "message"), WRONG.values(), ids=WRONG)
def test_wrong_numbers_of_heads(
    refused: Callable[..., str], mha: Path, tmp_path: Path, n_kv_heads: str, message: str
) -> None:
    line = refused("convert", "gqa", mha, tmp_path / "gqa", "--n-kv-heads", n_kv_heads)
    assert message.format(mha=mha) in line


def test_one_head_cannot_be_fewer(refused: Callable[..., str], mha: Path, tmp_path: Path) -> None:
    convert(mha, tmp_path / "one", 1)
    line = refused("convert", "gqa", tmp_path / "one", tmp_path / "none", "--n-kv-heads", 1)
    assert "has model.n_kv_heads=1, which cannot be fewer" in line


def test_a_run_with_fewer_heads_is_told_the_way(
    refused: Callable[..., str], mha: Path, tmp_path: Path, tiny_args: Callable[..., list[str]]
) -> None:
    line = refused("train", *tiny_args(tmp_path / "run", f"run.init_from={mha}", "model.n_heads=4"))
    assert (
        "model.n_kv_heads is 4 there and 1 here; leave these settings out, the model is then that run's, or let" in line
    )
    assert "`pretrain convert gqa` average its key/value heads first" in line
