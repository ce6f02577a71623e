"""Expert capacity: each expert takes a limited number of the tokens of a row, and drops the rest.

The limit holds for each row by itself (a group in GShard, arXiv:2006.16668, section 2.2), so that what is dropped does
not depend on the layout or on the size of a microbatch. Shape suffixes: B rows, R tokens of a row, K experts of a
token, N = R*K assignments of a row, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.config.model import MoeConfig


def capacity(moe: MoeConfig, row_len: int) -> int:
    """Assignments that an expert takes of a row of `row_len` tokens."""
    assert moe.capacity_factor is not None
    exact = moe.capacity_factor * moe.top_k * row_len / moe.n_experts
    return math.ceil(round(exact, 6))  # 1.1 * 10 is a little more than 11


def drop_overflow(expert_BRK: Tensor, weight_BRK: Tensor, moe: MoeConfig) -> Tensor:
    """Replace assignments beyond the capacity of their expert by `n_experts`.

    Args:
        expert_BRK: experts of the tokens of full rows.
        weight_BRK: their weights; with `drop_policy=score` an expert keeps the largest.
        moe: settings.
    """
    expert_BN, (R, K) = expert_BRK.flatten(1), expert_BRK.shape[1:]
    if moe.drop_policy == "score":
        order_BN = weight_BRK.flatten(1).argsort(dim=1, descending=True, stable=True)
    else:
        order_BN = torch.arange(R * K, device=expert_BN.device).expand_as(expert_BN)
    # Sort once more, by expert: an assignment's place among those of its expert is its distance from their first.
    order_BN = order_BN.gather(1, expert_BN.gather(1, order_BN).argsort(dim=1, stable=True))
    sorted_BN = expert_BN.gather(1, order_BN)
    experts_BE = torch.arange(moe.n_experts, device=expert_BN.device).expand(len(expert_BN), -1).contiguous()
    first_BE = torch.searchsorted(sorted_BN, experts_BE)
    place_BN = torch.arange(R * K, device=expert_BN.device) - first_BE.gather(1, sorted_BN)
    kept_BN = torch.where(place_BN < capacity(moe, R), sorted_BN, moe.n_experts)
    return torch.empty_like(expert_BN).scatter_(1, order_BN, kept_BN).view_as(expert_BRK)
