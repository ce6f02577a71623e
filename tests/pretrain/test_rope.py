"""RoPE and its extensions against transformers' tables, and against what they promise."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pretrain.config import RopeConfig
from pretrain.model.rope import attention_scaling, dynamic_ntk_frequencies, inverse_frequencies, rope_tables

HEAD_DIM = 32
ORIGINAL = 64

VARIANTS = {
    "default": (RopeConfig(theta=500.0), {"rope_type": "default", "rope_theta": 500.0}),
    "linear": (RopeConfig(kind="linear", factor=4), {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
    "dynamic_ntk": (
        RopeConfig(kind="dynamic_ntk", factor=4, original_max_seq_len=ORIGINAL),
        {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    "yarn": (
        RopeConfig(kind="yarn", factor=8, original_max_seq_len=ORIGINAL, beta_fast=24, beta_slow=2),
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
        },
    ),
    "llama3": (
        RopeConfig(
            kind="llama3",
            theta=500_000.0,
            factor=8,
            original_max_seq_len=ORIGINAL,
            low_freq_factor=1,
            high_freq_factor=4,
        ),
        {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": ORIGINAL,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
}


def theirs(parameters: dict[str, object]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=ORIGINAL,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_frequencies_equal_transformers_to_1e5(kind: str) -> None:
    ours, parameters = VARIANTS[kind]
    frequencies, scaling = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](theirs(parameters), "cpu")
    torch.testing.assert_close(inverse_frequencies(ours, HEAD_DIM), frequencies, rtol=1e-5, atol=0)
    assert attention_scaling(ours) == pytest.approx(scaling, abs=1e-12)


def test_yarn_scales_cosine_and_sine_by_a_tenth_of_the_log_of_the_factor_plus_one() -> None:
    yarn, _ = VARIANTS["yarn"]
    cos, _ = rope_tables(yarn, HEAD_DIM, torch.zeros(1, 1, dtype=torch.long))
    torch.testing.assert_close(cos, torch.full_like(cos, 0.1 * math.log(8) + 1))


@pytest.mark.parametrize("length", [16, ORIGINAL, 3 * ORIGINAL])
def test_dynamic_ntk_equals_transformers_at_every_length(length: int) -> None:
    ours, parameters = VARIANTS["dynamic_ntk"]
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs(parameters), "cpu", seq_len=length)
    torch.testing.assert_close(
        dynamic_ntk_frequencies(ours, HEAD_DIM, torch.tensor([length]))[0], frequencies, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("length", [48, 3 * ORIGINAL])
def test_rotated_heads_equal_transformers_to_1e5(kind: str, length: int) -> None:
    ours, parameters = VARIANTS[kind]
    positions = torch.arange(length)[None]
    x = torch.randn(1, length, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(theirs(parameters))(x, positions)
    left, right = x.chunk(2, dim=-1)
    expected = x * cos[:, :, None] + torch.cat((-right, left), dim=-1) * sin[:, :, None]
    torch.testing.assert_close(rope_tables(ours, HEAD_DIM, positions).rotate(x), expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_base_is_seen() -> None:
    ours, parameters = VARIANTS["llama3"]
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs(parameters), "cpu")
    wrong = inverse_frequencies(ours.model_copy(update={"theta": 10_000.0}), HEAD_DIM)
    assert (wrong / frequencies - 1).abs().max() > 0.5


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest_by_the_factor() -> None:
    plain = inverse_frequencies(RopeConfig(), HEAD_DIM)
    ntk = inverse_frequencies(RopeConfig(kind="ntk", factor=4), HEAD_DIM)
    assert ntk[0] == plain[0]
    assert (plain[-1] / ntk[-1]).item() == pytest.approx(4, rel=1e-5)


def test_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, generator=generator)

    def score(query_at: int, key_at: int) -> float:
        at = [rope_tables(RopeConfig(), HEAD_DIM, torch.tensor([[p]])) for p in (query_at, key_at)]
        return float((at[0].rotate(q) * at[1].rotate(k)).sum())

    assert score(57, 40) == pytest.approx(score(17, 0), abs=1e-4)
    assert abs(score(57, 40) - score(57, 41)) > 1e-2


def test_bf16_heads_are_rotated_in_fp32_and_rounded_once() -> None:
    x = torch.randn(1, 9, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    rope = rope_tables(RopeConfig(), HEAD_DIM, torch.arange(9)[None])
    assert torch.equal(rope.rotate(x), rope.rotate(x.float()).bfloat16())


def test_dynamic_ntk_has_no_frequencies_without_a_length() -> None:
    with pytest.raises(ValueError, match=r"rope\.kind=dynamic_ntk"):
        inverse_frequencies(VARIANTS["dynamic_ntk"][0], HEAD_DIM)
