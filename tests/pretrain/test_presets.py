"""Every preset is a valid shape, and the named models have the parameters that were published."""

from pathlib import Path

import pytest
import torch
import yaml

import configs
from pretrain.config import AUTO, ModelConfig
from pretrain.estimate.flops import count_parameters, flops_per_token, parameter_count
from pretrain.model.architectures.llama import Llama

PRESETS = {file.stem: file for file in sorted((Path(configs.__file__).parent / "models").glob("*.yaml"))}
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen3-8b": 8_190_735_360,
}


def preset(name: str, **changes: object) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load(PRESETS[name].read_text()) | changes)


def built(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def test_the_presets_are_these() -> None:
    assert set(PRESETS) == {"tiny", "demo", "125m", "350m", "1b", *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_have_their_published_parameter_count(name: str) -> None:
    assert parameter_count(preset(name)) == PUBLISHED[name]
    assert built(preset(name)) == PUBLISHED[name]


def test_another_width_is_another_count() -> None:
    assert parameter_count(preset("llama3-8b", d_ff=14_335)) != PUBLISHED["llama3-8b"]


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [
        ("tiny", 256, 90_432),
        ("demo", 4096, 3.8e6),
        ("125m", 50_304, 124e6),
        ("350m", 50_304, 360e6),
        ("1b", 128_256, 1_235_814_400),
    ],
)
def test_sizes_by_name_are_what_the_name_says(name: str, vocab_size: int, expected: float) -> None:
    assert parameter_count(preset(name, vocab_size=vocab_size)) == pytest.approx(
        expected, rel=0.02 if expected < 1e9 else 0
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PUBLISHED])
def test_our_own_shapes_leave_the_vocabulary_to_the_tokenizer(name: str) -> None:
    assert preset(name).vocab_size == AUTO


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"qk_norm": True},
        {"qkv_bias": True},
        {"n_kv_heads": 1},
        {"head_dim": 32, "tie_embeddings": False},
    ],
    ids=str,
)
def test_the_formula_counts_what_is_built(changes: dict[str, object]) -> None:
    config = preset("tiny", vocab_size=256, **changes)
    assert parameter_count(config) == built(config)
    with torch.device("meta"):
        model = Llama(config)
    counts = count_parameters(config).by_kind
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts["norms"] == sum(n for name, n in sizes.items() if "norm" in name)
    assert counts.get("biases", 0) == sum(n for name, n in sizes.items() if name.endswith("bias"))
    assert counts["mlp"] == sum(n for name, n in sizes.items() if ".mlp." in name)
    assert count_parameters(config).matmul == model.output_weight.numel() + sum(
        n for name, n in sizes.items() if name.endswith("proj.weight")
    )


@pytest.mark.parametrize(("name", "causal", "excess"), [("llama3-8b", True, 0.068), ("llama3-8b", False, 0.202)])
def test_flops_exceed_6nd_by_the_published_share(name: str, causal: bool, excess: float) -> None:
    config = preset(name)
    matmul = 6 * count_parameters(config).matmul
    attention = flops_per_token(config, 8192, causal=causal) - matmul
    assert attention == (6 if causal else 12) * 32 * 4096 * 8192
    assert flops_per_token(config, 8192, causal=causal) / (6 * parameter_count(config)) - 1 == pytest.approx(
        excess, abs=1e-3
    )


def test_a_window_saves_what_it_does_not_see() -> None:
    config = preset("mistral-7b")
    matmul = 6 * count_parameters(config).matmul
    width = 32 * 4096
    assert flops_per_token(config, 4096) - matmul == 6 * width * 4096
    pairs = sum(min(i, 4096) for i in range(1, 16_385)) / 16_384  # exact, with the diagonal that the convention halves
    assert (flops_per_token(config, 16_384) - matmul) / (12 * width) == pytest.approx(pairs, rel=2e-4)
