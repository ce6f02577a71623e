"""Rotary position embedding (arXiv:2104.09864) and its extensions to longer contexts.

Pairs are split in halves, as Hugging Face does: element i turns with element i + P.

Angles are computed from explicit positions, once per forward pass, in fp32, outside of the blocks. There are no
buffers: a model built on the meta device has nothing more to fill in, and a cast to bf16 cannot round the angles.
Shape suffixes: B batch, S sequence, K head width, P = K/2 rotated pairs, X any number of heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.config import RopeConfig


class Rope(NamedTuple):
    """Cosine and sine of every rotation angle, fp32, with room for the heads: [B, S, 1, P]."""

    cos_BS1P: Tensor
    sin_BS1P: Tensor

    def rotate(self, x_BSXK: Tensor) -> Tensor:
        """Rotate the pairs (x[i], x[i + P]) of every head. Computes in fp32, returns the dtype of x."""
        left, right = x_BSXK.float().chunk(2, dim=-1)
        cos, sin = self
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_BSXK.dtype)


def rope_tables(config: RopeConfig, head_dim: int, positions_BS: Tensor, lengths_BS: Tensor | None = None) -> Rope:
    """Compute the rotation tables of the given positions.

    `lengths_BS` is the length, in tokens, of each token's document. Only `dynamic_ntk` reads it; without it, it uses
    the largest position of the row.
    """
    if config.kind == "dynamic_ntk":
        if lengths_BS is None:
            lengths_BS = positions_BS.amax(-1, keepdim=True) + 1
        frequencies = dynamic_ntk_frequencies(config, head_dim, lengths_BS)
    else:
        frequencies = inverse_frequencies(config, head_dim, positions_BS.device)
    angles_BSP = positions_BS.float()[..., None] * frequencies
    scale = attention_scaling(config)
    return Rope((angles_BSP.cos() * scale)[:, :, None], (angles_BSP.sin() * scale)[:, :, None])


def inverse_frequencies(config: RopeConfig, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Radians by which each of the P pairs turns per token, fp32 [P], for every kind but `dynamic_ntk`."""
    exponents_P = _exponents(head_dim, device)
    match config.kind:
        case "ntk":  # a larger base: the slowest pair is interpolated by exactly `factor`, the fastest is unchanged
            theta = config.theta * config.factor ** (head_dim / (head_dim - 2))
            return torch.pow(theta, exponents_P).reciprocal()
        case "linear":
            return torch.pow(config.theta, exponents_P).reciprocal() / config.factor
        case "yarn":
            return _yarn(config, head_dim, exponents_P)
        case "llama3":
            return _llama3(config, torch.pow(config.theta, exponents_P).reciprocal())
        case "default":
            return torch.pow(config.theta, exponents_P).reciprocal()
    raise ValueError(f"the frequencies of rope.kind={config.kind} depend on the length; use dynamic_ntk_frequencies")


def dynamic_ntk_frequencies(config: RopeConfig, head_dim: int, lengths_BS: Tensor) -> Tensor:
    """NTK-aware frequencies, whose base grows with the length beyond the original context; fp32 [B, S, P]."""
    lengths = lengths_BS.clamp(min=config.original_max_seq_len).float()
    growth = config.factor * lengths / config.original_max_seq_len - (config.factor - 1)
    theta_BS1 = (config.theta * growth ** (head_dim / (head_dim - 2)))[..., None]
    return torch.pow(theta_BS1, _exponents(head_dim, lengths.device)).reciprocal()


def attention_scaling(config: RopeConfig) -> float:
    """Factor on cosine and sine: YaRN's temperature sqrt(1/t) = 0.1 ln(factor) + 1 (arXiv:2309.00071, eq. 22), or 1."""
    return 0.1 * math.log(config.factor) + 1.0 if config.kind == "yarn" else 1.0


def _exponents(head_dim: int, device: torch.device | str) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim


def _yarn(config: RopeConfig, head_dim: int, exponents_P: Tensor) -> Tensor:
    """Keep the pairs that turn often over the original context, and interpolate those that turn rarely.

    In between, blend both (section 3.2).
    """

    def pair_turning(rotations: float) -> float:
        turns = config.original_max_seq_len / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(config.theta))

    first = max(math.floor(pair_turning(config.beta_fast)), 0)
    last = min(math.ceil(pair_turning(config.beta_slow)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=exponents_P.device)
    interpolated_P = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    kept_P = torch.pow(config.theta, exponents_P).reciprocal()
    return kept_P / config.factor * interpolated_P + kept_P * (1 - interpolated_P)


def _llama3(config: RopeConfig, frequencies_P: Tensor) -> Tensor:
    """Divide long wavelengths by `factor`, keep short ones, blend in between (Llama 3.1, arXiv:2407.21783)."""
    turns_P = config.original_max_seq_len * frequencies_P / (2 * math.pi)
    kept_P = ((turns_P - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
    return (1 - kept_P) * frequencies_P / config.factor + kept_P * frequencies_P
