"""Every preset is a valid shape, and the named models have the parameters that were published."""

from pathlib import Path

import pytest
import torch
import yaml

import configs
from pretrain.config import AUTO, ModelConfig
from pretrain.estimate.flops import count_parameters, flops_per_token, parameter_count
from pretrain.model.architectures.llama import Llama
from pretrain.model.architectures.moe import MoETransformer

PRESETS = {file.stem: file for file in sorted((Path(configs.__file__).parent / "models").glob("*.yaml"))}
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "olmoe-1b-7b": 6_919_161_856,
    "dots-llm1": 142_774_373_888,
}
"""Parameters in the published files. Those of dots.llm1 also have the biases of its routers, 61 x 128 numbers."""
PUBLISHED_ACTIVE = {
    "mixtral-8x7b": 12.9e9,  # mistral.ai/news/mixtral-of-experts; arXiv:2401.04088 says 13B
    "mixtral-8x22b": 39_152_031_744,  # hf.co/mistral-community/Mixtral-8x22B-v0.1, discussion 6
    "qwen3-30b-a3b": 3.3e9,  # model card, which rounds 3.35 down
    "qwen3-235b-a22b": 22e9,  # arXiv:2505.09388, section 2
    "olmoe-1b-7b": 1.3e9,  # arXiv:2409.02060, table 1
    "dots-llm1": 14e9,  # arXiv:2506.05767
}
"""Parameters that one token uses, its embedding included."""


def preset(name: str, **changes: object) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load(PRESETS[name].read_text()) | changes)


def shapes(config: ModelConfig) -> dict[str, int]:
    """{name: number of elements} of the modules, built without memory."""
    with torch.device("meta"):
        model = {"llama": Llama, "moe": MoETransformer}[config.architecture](config)
    return {name: p.numel() for name, p in model.named_parameters()}


def built(config: ModelConfig) -> int:
    return sum(shapes(config).values())


def active(config: ModelConfig) -> float:
    """Parameters that one token uses."""
    fraction = config.moe.top_k / max(1, config.moe.n_experts)
    return sum(n * (fraction if ".experts." in name else 1) for name, n in shapes(config).items())


def test_the_presets_are_these() -> None:
    ours = {"tiny", "demo", "125m", "350m", "1b", "moe-tiny", "moe-demo", "switch-8"}
    assert set(PRESETS) == {*ours, *PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_have_their_published_parameter_count(name: str) -> None:
    assert parameter_count(preset(name)) == PUBLISHED[name]
    assert built(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_ACTIVE)
def test_a_token_uses_the_published_number_of_parameters(name: str) -> None:
    exact = isinstance(PUBLISHED_ACTIVE[name], int)
    assert active(preset(name)) == pytest.approx(PUBLISHED_ACTIVE[name], rel=0 if exact else 0.02)
    assert count_parameters(preset(name)).active == active(preset(name))
    one_more = preset(name, moe=preset(name).moe.model_copy(update={"top_k": preset(name).moe.top_k + 1}))
    assert active(one_more) != pytest.approx(PUBLISHED_ACTIVE[name], rel=0.02)


def test_a_token_of_the_demo_with_experts_uses_as_many_parameters_as_one_of_the_dense_demo() -> None:
    dense, experts = (preset(name, vocab_size=4096) for name in ("demo", "moe-demo"))
    assert active(experts) == pytest.approx(built(dense), rel=0.01)
    assert built(experts) > 2 * built(dense)


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
        ("moe-tiny", 256, 170_944),
        ("moe-demo", 4096, 9.7e6),
        ("switch-8", 50_304, 322e6),
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
