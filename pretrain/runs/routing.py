"""From what routers count to what a user watches: load, entropy, dropped tokens, losses, specialisation.

Shape suffixes: L layers of the model, M layers with experts, E experts, W = E + 4 columns of `StepResult.routing`: the
counts of the experts, then four sums over the tokens (`pretrain.model.moe.router`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.config.model import MoeConfig
from pretrain.runs.schema import RoutingStatistics

FloatArray = NDArray[np.float64]

DECIMALS = 4
"""Of the numbers of a layer: with 94 layers a step's line has 4 kB."""


class StepRouting(NamedTuple):
    """The fields of a `StepRecord` that only a model with experts has."""

    aux_loss: float | None = None
    router_z_loss: float | None = None
    statistics: RoutingStatistics | None = None


def step_routing(routing_LW: FloatArray, n_tokens: int, moe: MoeConfig) -> StepRouting:
    """Return what a step's record holds.

    Args:
        routing_LW: what the routers counted over the global batch.
        n_tokens: tokens of that batch.
        moe: settings of the experts.
    """
    aux_loss, z_loss, *_ = (routing_LW[:, moe.n_experts :].sum(0) / n_tokens).tolist()
    return StepRouting(
        aux_loss if moe.aux_loss else None,
        z_loss if moe.router_z_loss else None,
        routing_statistics(routing_LW, n_tokens, moe),
    )


def routing_statistics(routing_LW: FloatArray, n_tokens: int, moe: MoeConfig) -> RoutingStatistics:
    """Return the statistics of each layer with experts. Arguments as in `step_routing`."""
    layers, routing_MW = _with_experts(routing_LW, moe)
    counts_ME = routing_MW[:, : moe.n_experts]
    aux_M, z_M, entropy_M, dropped_M = routing_MW[:, moe.n_experts :].T / n_tokens
    mean_M = np.maximum(counts_ME.mean(1), 1 / moe.n_experts)  # without a token the load is 0, not undefined
    return RoutingStatistics(
        layers=layers,
        load_max=_rounded(counts_ME.max(1) / mean_M),
        dead=tuple((counts_ME == 0).sum(1).tolist()),
        entropy=_rounded(entropy_M / np.log(max(2, moe.n_experts))),
        dropped=None if moe.capacity_factor is None else _rounded(dropped_M / moe.top_k),
        aux_loss=_rounded(aux_M / moe.aux_loss) if moe.aux_loss else None,
        router_z_loss=_rounded(z_M / moe.router_z_loss) if moe.router_z_loss else None,
    )


def expert_counts(routing_LW: FloatArray, moe: MoeConfig) -> dict[int, tuple[int, ...]]:
    """Return for each layer with experts how often each was chosen."""
    layers, routing_MW = _with_experts(routing_LW, moe)
    counts_ME = routing_MW[:, : moe.n_experts].astype(np.int64).tolist()
    return {layer: tuple(counts_E) for layer, counts_E in zip(layers, counts_ME, strict=True)}


def load_over_mean(counts_ME: ArrayLike) -> FloatArray:
    """Return each expert's load over the mean of its layer, [M, E]: 1 is even, 0 is dead."""
    counts = np.asarray(counts_ME, dtype=np.float64)
    total_M1 = counts.sum(-1, keepdims=True)
    load_ME: FloatArray = counts * counts.shape[-1] / np.maximum(total_M1, 1)
    return load_ME


def kl_to_uniform(counts_ME: ArrayLike) -> FloatArray:
    """Return the Kullback-Leibler divergence of the load from an even one, [M], in nats: 0 if even, log(E) at most."""
    load_ME = load_over_mean(counts_ME)
    log_load_ME = np.log(load_ME, where=load_ME > 0, out=np.zeros_like(load_ME))
    kl_M: FloatArray = (load_ME * log_load_ME).mean(-1)
    return kl_M


def _with_experts(routing_LW: FloatArray, moe: MoeConfig) -> tuple[tuple[int, ...], FloatArray]:
    layers = tuple(filter(moe.has_experts, range(len(routing_LW))))
    return layers, routing_LW[list(layers)]


def _rounded(values: FloatArray) -> tuple[float, ...]:
    return tuple(np.round(values, DECIMALS).tolist())
