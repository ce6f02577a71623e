"""Mixtures of experts as the papers write them: a loop over tokens and experts, in fp64, for tests to compare with.

Shape suffixes: B rows, S tokens, D model width, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.config.model import MoeConfig
from pretrain.model.attention import DocumentMask
from pretrain.model.moe.layer import MoE

D, D_FF = 16, 12


def model_config(**moe: object) -> ModelConfig:
    """A model of one layer, with 8 experts unless `moe` says otherwise."""
    settings = MoeConfig.model_validate({"n_experts": 8, "d_ff": D_FF} | moe)
    return ModelConfig(architecture="moe", vocab_size=64, n_layers=1, d_model=D, n_heads=2, n_kv_heads=2, moe=settings)


def make_layer(config: ModelConfig, dtype: torch.dtype = torch.float32, layer: int = 0) -> MoE:
    """A layer with weights that make every part of the output about as large, and a bias that changes the choice."""
    moe = MoE(config, layer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
        moe.gate.reset_buffers()
        for name in moe.gate.saved:
            values = torch.rand(config.moe.n_experts, generator=generator)
            getattr(moe.gate, name).copy_(values / values.sum() if name == "expert_load" else values - 0.5)
    for parameter in moe.parameters():
        parameter.data = parameter.data.to(dtype)
    return moe


def mask_of(row_keys_B: Tensor | None) -> DocumentMask:
    """What a layer with experts reads of a mask."""
    return DocumentMask("sdpa", None, torch.zeros(0), None, (), row_keys_B)


@dataclass
class Reference:
    """What a layer computes of a batch."""

    out_BSD: Tensor
    aux_loss: Tensor
    """The loss of all counted tokens, to be divided by their number; weighted, as the next."""
    z_loss: Tensor
    counts: list[int]
    """Assignments of each expert, before any is dropped."""
    entropy: float
    dropped: int


def compute(layer: MoE, parameters: dict[str, Tensor], x_BSD: Tensor, counted: list[bool]) -> Reference:
    """The layer of these parameters. The aux loss of the global batch reads the load of the layer's buffer."""
    moe = layer.gate.config
    bias = [float(b) for b in layer.gate.e_score_correction_bias] if moe.expert_bias else [0.0] * moe.n_experts
    logits_BSE = x_BSD @ parameters["gate.weight"].T
    rows = [[route(logits_E, moe, bias) for logits_E in logits_SE] for logits_SE in logits_BSE]
    dropped = [overflow(row, moe) for row in rows]
    out = [
        [
            token(x_BSD[b, s], experts, weights, {e for t, e in dropped[b] if t == s}, parameters)
            for s, (experts, weights) in enumerate(row)
        ]
        for b, row in enumerate(rows)
    ]
    kept = [b for b, counts in enumerate(counted) if counts]
    shares_BSE = torch.stack([torch.stack([shares(logits_E, moe) for logits_E in row]) for row in logits_BSE])
    load = [Counter(e for experts, _ in rows[b] for e in experts) for b in kept]
    counts = [sum(row[e] for row in load) for e in range(moe.n_experts)]
    if moe.aux_loss_scope == "global_batch":
        fractions = [layer.gate.expert_load.tolist() if moe.aux_loss else [0.0] * moe.n_experts] * len(kept)
    elif moe.aux_loss_scope == "sequence":
        fractions = [[row[e] / row.total() for e in range(moe.n_experts)] for row in load]
    else:
        fractions = [[count / sum(counts) for count in counts]] * len(kept)
    sum_of_shares = [shares_BSE[b].sum(0) for b in kept]
    aux = sum((torch.tensor(f, dtype=x_BSD.dtype) * p_E).sum() for f, p_E in zip(fractions, sum_of_shares, strict=True))
    entropy = -sum((shares_BSE[b] * shares_BSE[b].log()).sum().item() for b in kept)
    return Reference(
        torch.stack([torch.stack(row) for row in out]),
        moe.aux_loss * moe.n_experts * torch.as_tensor(aux),
        moe.router_z_loss * sum((logits_BSE[b].exp().sum(-1).log() ** 2).sum() for b in kept),
        counts,
        entropy,
        sum(len(dropped[b]) for b in kept),
    )


def route(logits_E: Tensor, moe: MoeConfig, bias: list[float]) -> tuple[list[int], Tensor]:
    """The experts of a token, best first, and their weights."""
    scores_E = logits_E.exp() / logits_E.exp().sum() if moe.score_function == "softmax" else 1 / (1 + (-logits_E).exp())
    choice = [score + b for score, b in zip(scores_E.tolist(), bias, strict=True)]
    size = moe.n_experts // moe.n_groups
    n_best = 1 if moe.score_function == "softmax" else 2
    group_score = [sum(sorted(choice[g * size : (g + 1) * size])[-n_best:]) for g in range(moe.n_groups)]
    groups = sorted(range(moe.n_groups), key=lambda g: -group_score[g])[: moe.top_k_groups]
    allowed = [e for e in range(moe.n_experts) if moe.n_groups == 1 or e // size in groups]
    experts = sorted(allowed, key=lambda e: -choice[e])[: moe.top_k]
    if moe.softmax_after_top_k:
        chosen = logits_E[experts].exp()
        weights = chosen / chosen.sum()
    else:
        weights = scores_E[experts]
        if moe.normalize_top_k and moe.top_k > 1:
            weights = weights / weights.sum()
    return experts, weights * moe.routed_scaling_factor


def shares(logits_E: Tensor, moe: MoeConfig) -> Tensor:
    """The scores of a token, divided by their sum."""
    scores_E = logits_E.exp() if moe.score_function == "softmax" else 1 / (1 + (-logits_E).exp())
    return scores_E / scores_E.sum()


def overflow(row: list[tuple[list[int], Tensor]], moe: MoeConfig) -> set[tuple[int, int]]:
    """The (token, expert) of a row that are dropped."""
    if moe.capacity_factor is None:
        return set()
    capacity = math.ceil(moe.capacity_factor * moe.top_k * len(row) / moe.n_experts)
    dropped = set()
    for expert in range(moe.n_experts):
        arrivals = [
            (t, weights[experts.index(expert)].item()) for t, (experts, weights) in enumerate(row) if expert in experts
        ]
        if moe.drop_policy == "score":
            arrivals.sort(key=lambda arrival: -arrival[1])
        dropped |= {(t, expert) for t, _ in arrivals[capacity:]}
    return dropped


def token(x_D: Tensor, experts: list[int], weights: Tensor, dropped: set[int], parameters: dict[str, Tensor]) -> Tensor:
    """The output for one token."""
    out_D = torch.zeros_like(x_D)
    for expert, weight in zip(experts, weights, strict=True):
        if expert not in dropped:
            gate_F, up_F = (parameters["experts.gate_up_proj"][expert] @ x_D).chunk(2)
            hidden_F = gate_F * torch.sigmoid(gate_F) * up_F
            out_D = out_D + weight * (parameters["experts.down_proj"][expert] @ hidden_F)
    if "shared_experts.gate_proj.weight" in parameters:
        gate_F, up_F = (parameters[f"shared_experts.{name}_proj.weight"] @ x_D for name in ("gate", "up"))
        shared_D = parameters["shared_experts.down_proj.weight"] @ (gate_F * torch.sigmoid(gate_F) * up_F)
        if "shared_expert_gate.weight" in parameters:
            shared_D = torch.sigmoid(parameters["shared_expert_gate.weight"] @ x_D) * shared_D
        out_D = out_D + shared_D
    return out_D
