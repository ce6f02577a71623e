"""Text from a trained run: complete characters, the same text for the same seed, the latest valid checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint.load import load_checkpoint
from pretrain.errors import UserError
from pretrain.inference.sample import SamplingOptions, _text_pieces, continue_text, load_trained_run
from pretrain.model.architectures.llama import Llama
from pretrain.model.init import init_weights
from pretrain.train.loop import Outcome

CPU = torch.device("cpu")
WHO = ("the model", "a reader", "the loop", "every rank", "one shard", "the old engine")
LANGUAGE = {*" ".join(WHO).split(), "reads", "writes", "skips", "remembers", "shuffles", "follows"}
LANGUAGE |= {"a", "token", "its", "batch", "the", "gradient", "two", "documents", "next", "step", "no", "data"}


@pytest.fixture(scope="module")
def run_dir(run_tiny: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        run_tiny(path, "train.steps=60", "optim.lr=0.02", "checkpoint.every=30", "train.precision=bf16")
    return path


@pytest.fixture(scope="module")
def trained(run_dir: Path) -> tuple[Llama, Tokenizer]:
    return load_trained_run(run_dir, CPU, unexpected)[:2]


def unexpected(path: Path, problems: list[str]) -> None:
    raise AssertionError(f"{path}: {problems}")


def test_the_weights_are_the_checkpoints_rounded_to_the_precision_of_the_run(run_dir: Path) -> None:
    model, tokenizer, config, path = load_trained_run(run_dir, CPU, unexpected)
    assert path.name == "step-00000060"
    assert tokenizer.vocab_size == 300
    assert config.train.steps == 60
    assert not model.training
    saved = {name: torch.empty(weight.shape) for name, weight in model.named_parameters()}
    load_checkpoint(path, {"model": saved})
    for name, weight in model.named_parameters():
        assert torch.equal(weight, saved[name].bfloat16()), name


def test_routers_keep_their_bias_in_fp32(run_tiny: Callable[..., Outcome], tmp_path: Path) -> None:
    experts = ("model.architecture=moe", "model.moe.n_experts=4", "model.moe.d_ff=32", "model.moe.expert_bias=true")
    short = ("train.steps=4", "optim.warmup=0", "checkpoint.every=4", "train.precision=bf16", "model.n_layers=1")
    run_tiny(tmp_path / "run", *experts, *short, "model.moe.bias_update_rate=0.0011")
    model, *_ = load_trained_run(tmp_path / "run", CPU, unexpected)
    bias_E = model.state_dict()["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias_E.dtype == torch.float32
    steps = bias_E / 0.0011
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert steps.abs().max() >= 2


def test_the_text_is_in_the_language_it_was_trained_on(trained: tuple[Llama, Tokenizer]) -> None:
    """Half of its words at least, after 60 steps; of what the same model wrote before them, hardly any."""
    model, tokenizer = trained
    untrained = Llama(model.config)
    init_weights(untrained, seed=0)
    shares = []
    for candidate in (model, untrained.bfloat16()):
        text = " ".join(
            "".join(continue_text(candidate, tokenizer, who, SamplingOptions(temperature=0))) for who in WHO
        )
        words = text.replace(".", "").split()
        shares.append(sum(word in LANGUAGE for word in words) / len(words))
    assert shares[0] > 0.5 > 0.1 > shares[1]


def test_the_same_seed_gives_the_same_text_and_another_one_another(trained: tuple[Llama, Tokenizer]) -> None:
    texts = [
        "".join(continue_text(*trained, "the", SamplingOptions(max_new_tokens=30, temperature=1.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_starts_after_an_end_of_text_token(
    trained: tuple[Llama, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    monkeypatch.setattr(
        "pretrain.inference.sample.generate", lambda _, prompt, **__: prompts.append(prompt) or iter(())
    )
    assert list(continue_text(*trained, "", SamplingOptions())) == []
    assert prompts == [[trained[1].eot_id]]


def test_the_context_ends_the_text(trained: tuple[Llama, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained
    requested: list[int] = []
    monkeypatch.setattr(
        "pretrain.inference.sample.generate",
        lambda *_, max_new_tokens, **__: requested.append(max_new_tokens) or iter(()),
    )
    prompt = "the loop reads a token."
    n = len(tokenizer.encode(prompt))
    for wanted in (5, 64 - n, 1000):
        list(continue_text(model, tokenizer, prompt, SamplingOptions(max_new_tokens=wanted)))
    assert requested == [5, 64 - n, 64 - n]


def test_a_prompt_that_fills_the_context_is_refused_before_any_text(trained: tuple[Llama, Tokenizer]) -> None:
    with pytest.raises(
        UserError, match=r"the prompt has 64 tokens, which leave no room for more in model\.max_seq_len=64"
    ):
        continue_text(*trained, "\x00" * 64, SamplingOptions())
    assert len("".join(continue_text(*trained, "\x00" * 63, SamplingOptions()))) <= 10


def test_pieces_join_to_the_text_and_cut_no_character(tiny_data: Path) -> None:
    tokenizer, text = load_tokenizer(tiny_data), "naïve Ω 漢字 🙂 end"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # the vocabulary is made of English: another letter is several bytes, each a token
    pieces = list(_text_pieces(iter(ids), tokenizer))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "🙂" in pieces
    cut = "".join(
        _text_pieces(iter(ids[: len(tokenizer.encode("naïve Ω 漢字")) - 1]), tokenizer)
    )  # the model may stop inside a character
    assert cut == "naïve Ω 漢\N{REPLACEMENT CHARACTER}"


def test_a_damaged_checkpoint_is_skipped_and_reported(run_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shard = copy / "checkpoints" / "step-00000060" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    message: list[str] = []
    *_, path = load_trained_run(copy, CPU, lambda damaged, problems: message.extend([damaged.name, *problems]))
    assert path.name == "step-00000030"
    assert message[0] == "step-00000060"
    assert "bytes instead of" in message[1]
