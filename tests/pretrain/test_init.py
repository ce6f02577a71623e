"""Initial weights depend on the seed and the parameter's name alone."""

import math

import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.model.init import ROWS, initial_rows, initialise
from pretrain.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=2 * ROWS + 100, n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, max_seq_len=64, qkv_bias=True, qk_norm=True
)


def weights(config: ModelConfig = CONFIG, seed: int = 7, *, meta: bool = False) -> dict[str, torch.Tensor]:
    with torch.device("meta" if meta else "cpu"):
        model = Transformer(config)
    if meta:
        model.to_empty(device="cpu")
    initialise(model, seed)
    return model.state_dict()


def test_meta_and_cpu_builds_get_the_same_weights_to_the_last_bit() -> None:
    built, materialised = weights(), weights(meta=True)
    assert all(torch.equal(built[name], materialised[name]) for name in built)


def test_a_deeper_model_keeps_the_weights_it_shares() -> None:
    shallow, deep = weights(), weights(CONFIG.model_copy(update={"n_layers": 8}))
    for name, value in shallow.items():
        scale = math.sqrt(2 / 8) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(deep[name], value * scale)


def test_rows_are_drawn_in_blocks_that_together_are_the_parameter() -> None:
    name, shape = "model.embed_tokens.weight", torch.Size((CONFIG.vocab_size, CONFIG.d_model))
    blocks = dict(initial_rows(name, shape, CONFIG, seed=7))
    assert sorted(blocks) == [0, ROWS, 2 * ROWS]
    assert torch.equal(torch.cat(list(blocks.values())), weights()[name])


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 0.02),
        ("lm_head.weight", 0.02),
        ("model.layers.0.mlp.gate_proj.weight", 0.02),
        ("model.layers.1.self_attn.o_proj.weight", 0.01),
        ("model.layers.1.mlp.down_proj.weight", 0.01),
    ],
)
def test_matrices_are_normal_and_those_into_the_residual_stream_smaller(name: str, std: float) -> None:
    values = weights()[name]
    assert values.std().item() == pytest.approx(std, rel=0.05)
    assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel())


def test_norms_are_1_and_biases_0() -> None:
    for name, value in weights().items():
        if value.ndim == 1:
            assert torch.equal(value, torch.full_like(value, 0.0 if name.endswith("bias") else 1.0)), name


def test_no_two_matrices_layers_blocks_or_seeds_share_numbers() -> None:
    first, other = weights(), weights(seed=8)
    rows = [value[0, :16] for value in (*first.values(), *other.values()) if value.ndim == 2]
    rows.append(first["model.embed_tokens.weight"][ROWS, :16])
    correlations = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.999


def test_bf16_weights_are_the_fp32_ones_rounded() -> None:
    model = Transformer(CONFIG).bfloat16()
    initialise(model, 7)
    assert all(torch.equal(value, weights()[name].bfloat16()) for name, value in list(model.state_dict().items())[:3])


def test_a_model_fresh_from_meta_computes_what_one_built_on_cpu_does() -> None:
    with torch.device("meta"):
        materialised = Transformer(CONFIG)
    materialised.to_empty(device="cpu")
    built = Transformer(CONFIG)
    for model in (materialised, built):
        initialise(model, 7)
    ids = torch.arange(20)[None]
    mask = built.document_mask(torch.zeros_like(ids), ids)
    assert torch.equal(materialised(ids, mask), built(ids, mask))
