"""FLOPs, parameters and pipeline stages of models with experts: what is built and what torch counts."""

from collections.abc import Mapping

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel.pipeline.schedule import assign_layers
from pretrain.config import ModelConfig
from pretrain.config.model import MoeConfig
from pretrain.estimate.flops import count_parameters, describe_parameters, flops_per_token, pipeline_costs
from pretrain.model.architectures.moe import MoETransformer
from pretrain.model.init import init_weights

B, S = 2, 64


def moe_config(moe: Mapping[str, object] | None = None, **model: object) -> ModelConfig:
    shape = {"vocab_size": 256, "n_layers": 4, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
    experts = {"n_experts": 8, "top_k": 2, "d_ff": 48} | dict(moe or {})
    return ModelConfig.model_validate(shape | {"architecture": "moe", "moe": MoeConfig.model_validate(experts)} | model)


CONFIGS = {
    "mixtral": moe_config({"softmax_after_top_k": True}),
    "fine-grained": moe_config({"n_experts": 64, "top_k": 8, "d_ff": 16}, qk_norm=True),
    "dots": moe_config(
        {"n_dense_layers": 1, "n_shared_experts": 2, "score_function": "sigmoid", "expert_bias": True}, n_layers=3
    ),
    "every second, gated": moe_config({"every_n_layers": 2, "n_shared_experts": 1, "shared_expert_gate": True}),
    "tied, switch": moe_config({"top_k": 1}, tie_embeddings=True),
}


def addmm(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    return 2 * left.numel() * right[1]


def attention(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    """Both products, over all of [S, S]."""
    return 4 * query.numel() * key[2]


def attention_backward(_: torch.Size, query: torch.Size, key: torch.Size, *__: object, **___: object) -> int:
    """The kernel computes the scores again, which MFU does not count."""
    return 2 * attention(query, key)


NOT_IN_TORCH = {
    torch.ops.aten.addmm_: addmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
"""Operators of a step on a CPU that torch's counter leaves out."""


def counted_flops(config: ModelConfig) -> int:
    """FLOPs of a forward and backward pass, as torch counts them."""
    model = MoETransformer(config)
    init_weights(model, seed=0)
    ids = torch.randint(config.vocab_size, (B, S), generator=torch.Generator().manual_seed(0))
    mask = model.document_mask(torch.zeros(B, S, dtype=torch.int32), torch.arange(S).expand(B, S))
    with FlopCounterMode(display=False, custom_mapping=NOT_IN_TORCH) as counter:
        model.loss(ids, ids, mask).total.backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_of_a_step_are_within_a_thousandth_of_what_torch_counts(name: str) -> None:
    formula = flops_per_token(CONFIGS[name], S, causal=False) * B * S
    assert counted_flops(CONFIGS[name]) == pytest.approx(formula, rel=1e-3)


def test_flops_that_leave_out_the_router_are_detected() -> None:
    config = CONFIGS["fine-grained"]
    without = flops_per_token(config, S, causal=False) - 6 * config.n_layers * 64 * config.d_model
    assert counted_flops(config) != pytest.approx(without * B * S, rel=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_active_parameters_are_all_but_the_experts_that_a_token_is_not_sent_to(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in MoETransformer(config).named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".mlp.experts." in name)
    counts = count_parameters(config)
    assert counts.total == sum(sizes.values())
    assert counts.active == counts.total - experts + experts * config.moe.top_k // config.moe.n_experts


def test_parameters_are_described_in_total_and_active() -> None:
    assert describe_parameters(CONFIGS["mixtral"]) == "379k parameters, 158k active"
    dense = ModelConfig(vocab_size=256, n_layers=2, d_model=64, n_heads=4, n_kv_heads=4, d_ff=96)
    assert describe_parameters(dense) == "103k parameters"


def test_a_stage_of_dense_layers_has_more_of_them() -> None:
    config = moe_config({"n_dense_layers": 3}, n_layers=8, d_ff=16)
    costs = pipeline_costs(config)
    dense, sparse = 12288 + 3 * 64 * 16, 12288 + 8 * 64 + 2 * 3 * 64 * 48
    assert sum(costs.layers) == pytest.approx(8)
    assert costs.layers[0] / costs.layers[7] == pytest.approx(dense / sparse)
    assert costs.last / costs.layers[0] == pytest.approx(256 * 64 / dense)
    assert [len(layers) for layers in assign_layers(costs, 2)] == [5, 3]
    assert [len(layers) for layers in assign_layers(pipeline_costs(moe_config(n_layers=8)), 2)] == [4, 4]
