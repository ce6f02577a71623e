"""Sparse upcycling (arXiv:2212.05055): a dense checkpoint becomes a mixture of experts.

Each expert is a copy of the dense MLP, or of a slice of it. The hidden width F of the MLP is cut into G = F / moe.d_ff
slices. MLP(x) is the sum of the slices' outputs. The first `n_shared_experts` slices become the shared experts, and the
R others become routed experts, each of them n_experts / R times: experts j*R to j*R + R - 1 are the j-th copy of the
routed part. The router is fresh. If R > 1, the experts of a copy begin with the same router row, so that they are
chosen together (the virtual groups of arXiv:2410.07524, section 3.3).

Then a token's chosen experts are whole copies if `top_k` is a multiple of R. Each slice gets 1/R of the sum of the
routing weights, so `down_proj` times R / (that sum) keeps the function exactly. The sum is known if weights are
normalised; otherwise it is that of even scores, and the function is only approximated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pretrain.checkpoint.streaming import LazyTensor, TensorReader
from pretrain.config import ModelConfig, RunConfig
from pretrain.config.loading import parse_arguments, validate
from pretrain.config.model import MoeConfig
from pretrain.convert.run import Conversion, Source
from pretrain.errors import UserError
from pretrain.model.init import init_shard, random_stream
from pretrain.model.spec import layer_of
from pretrain.setup.constraints import Violation, divisors, enforce, format_choices
from pretrain.setup.engine import build_model

DENSE = ("gate_proj", "up_proj", "down_proj")
GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Upcycling:
    """How the MLP of a layer becomes experts."""

    dense: ModelConfig
    model: ModelConfig
    """The mixture of experts."""
    seed: int
    """Of the routers and the noise."""
    noise_fraction: float
    """Fraction of the hidden features of each routed expert that begin as noise."""

    @property
    def moe(self) -> MoeConfig:
        """Settings of the experts."""
        return self.model.moe

    @property
    def n_slices(self) -> int:
        """G."""
        return self.dense.d_ff // self.moe.d_ff

    @property
    def n_routed_slices(self) -> int:
        """R."""
        return self.n_slices - self.moe.n_shared_experts

    @property
    def output_scale(self) -> float:
        """Factor of `down_proj` in the routed experts."""
        return self.n_routed_slices / (self.moe.routed_scaling_factor * _sum_of_weights(self.moe))

    @property
    def inexact_because(self) -> str:
        """Why the new model's function is not exactly the dense model's; empty if it is."""
        moe, R = self.moe, self.n_routed_slices
        if not _is_normalized(moe):
            scores = "model.moe.top_k=1 weights an expert by its own score"
            return f"{scores if moe.top_k == 1 else 'model.moe.normalize_top_k=false'}, so weights do not add up to 1"
        if moe.top_k % R:
            return f"model.moe.top_k={moe.top_k} is not a multiple of the {R} slices of the MLP that are routed"
        group = moe.n_experts // moe.n_groups
        # A group of whole copies, or whole groups of a copy, which have equal scores, are chosen together.
        if group % R and R % group:
            return f"model.moe.n_groups={moe.n_groups} makes groups of {group} experts, which cut copies of {R}"
        if moe.capacity_factor is not None:
            return f"model.moe.capacity_factor={moe.capacity_factor} drops what does not fit"
        return f"{self.noise_fraction:.0%} of each expert is noise" if self.noise_fraction else ""


def upcycle(source: Source, settings: Sequence[str], noise_fraction: float, seed: int) -> tuple[Conversion, Upcycling]:
    """Plan the conversion of a dense checkpoint; `write_run` carries it out.

    Args:
        source: the dense checkpoint.
        settings: arguments such as `model.moe.n_experts=8`.
        noise_fraction: of the hidden features of each routed expert, whose weights are drawn from a normal distribution
            with the mean and standard deviation of the dense matrix (arXiv:2502.19261, section 3).
        seed: of the routers and the noise.

    Raises:
        UserError: the settings are wrong, or the model is not dense or cannot be cut that way.
    """
    config = _moe_config(source, settings)
    plan = Upcycling(source.config.model, config.model, seed, noise_fraction)
    enforce((width_is_divided, shared_experts_are_slices, copies_are_whole), plan)
    description = (
        f"upcycled from {source.checkpoint.name} (generation {source.checkpoint.manifest.generation}) with seed={seed}"
        f" and noise_fraction={noise_fraction}"
    )
    return Conversion("upcycle", config, _tensors(plan, source.tensors), description), plan


def _moe_config(source: Source, settings: Sequence[str]) -> RunConfig:
    """The settings of the source, with experts. UserError if it has some already, or is no Llama model."""
    model, name = source.config.model, source.checkpoint.name
    if model.moe.n_experts:
        raise UserError(
            f"{name} is a mixture of experts already (model.moe.n_experts={model.moe.n_experts}); name a dense run"
        )
    if model.architecture != "llama":
        raise UserError(f"{name} has model.architecture={model.architecture}; only llama can be upcycled")
    for argument in settings:
        if not argument.startswith("model.moe."):
            raise UserError(
                f"`{argument}`: upcycling takes settings of model.moe only, such as model.moe.n_experts=8; all others "
                f"are those of {name}"
            )
    tree = source.config.model_dump(mode="json")
    moe = parse_arguments(settings)["model"]["moe"]
    tree["model"] |= {"architecture": "moe", "preset": None, "moe": moe}
    return validate(tree)


def width_is_divided(plan: Upcycling) -> Violation | None:
    """The experts' hidden width divides the dense MLP's."""
    if plan.dense.d_ff % plan.moe.d_ff == 0:
        return None
    return Violation(
        f"model.moe.d_ff={plan.moe.d_ff} does not divide model.d_ff={plan.dense.d_ff} into slices",
        f"use {format_choices(divisors(plan.dense.d_ff)[-6:])}",
    )


def shared_experts_are_slices(plan: Upcycling) -> Violation | None:
    """The shared experts are some slices of the MLP, and others are left to route."""
    if plan.n_routed_slices > 0:
        return None
    return Violation(
        f"model.moe.n_shared_experts={plan.moe.n_shared_experts} leaves none of the {plan.n_slices} slices of "
        f"model.moe.d_ff={plan.moe.d_ff} of the MLP to route",
        f"use at most {plan.n_slices - 1}" if plan.n_slices > 1 else "lower model.moe.d_ff, or use no shared experts",
    )


def copies_are_whole(plan: Upcycling) -> Violation | None:
    """Every routed slice has equally many experts."""
    if plan.moe.n_experts % plan.n_routed_slices == 0:
        return None
    R = plan.n_routed_slices
    near = max(1, round(plan.moe.n_experts / R)) * R
    return Violation(
        f"model.moe.n_experts={plan.moe.n_experts} is not a multiple of the {R} slices that are routed (model.d_ff="
        f"{plan.dense.d_ff} / model.moe.d_ff={plan.moe.d_ff}"
        + (f", less model.moe.n_shared_experts={plan.moe.n_shared_experts})" if plan.moe.n_shared_experts else ")"),
        f"use one, such as {near}",
    )


def _is_normalized(moe: MoeConfig) -> bool:
    """Whether the routing weights of a token add up to 1, before `routed_scaling_factor`."""
    return moe.softmax_after_top_k or (moe.normalize_top_k and moe.top_k > 1)


def _sum_of_weights(moe: MoeConfig) -> float:
    """The sum of a token's routing weights before `routed_scaling_factor`, if all scores are even."""
    if _is_normalized(moe):
        return 1.0
    return moe.top_k * (1 / moe.n_experts if moe.score_function == "softmax" else 0.5)


def _tensors(plan: Upcycling, dense: TensorReader) -> Mapping[str, LazyTensor]:
    """{name: tensor} of the new model. What is no expert or router is copied."""
    model = build_model(plan.model, "sdpa", torch.device("meta"))
    new = dict(model.named_parameters()) | model.saved_buffers
    return {name: LazyTensor.of(tuple(tensor.shape), _maker(plan, dense, name)) for name, tensor in new.items()}


def _maker(plan: Upcycling, dense: TensorReader, name: str) -> partial[Tensor]:
    """What makes the tensor of that name."""
    if name in dense.shapes:
        return partial(dense.read, name)
    layer = layer_of(name)
    mlp, _, own_name = name.partition(".mlp.")
    mlp = f"{mlp}.mlp"
    makers = {
        "gate.weight": partial(_router, plan, name),
        "gate.e_score_correction_bias": partial(torch.zeros, plan.moe.n_experts),
        "gate.expert_load": partial(torch.full, (plan.moe.n_experts,), 1 / plan.moe.n_experts),
        "experts.gate_up_proj": partial(_gate_up, plan, dense, mlp),
        "experts.down_proj": partial(_down, plan, dense, mlp),
        "shared_expert_gate.weight": partial(torch.zeros, 1, plan.model.d_model),
    } | {f"shared_experts.{matrix}.weight": partial(_shared, plan, dense, mlp, matrix) for matrix in DENSE}
    if layer is None or own_name not in makers:
        raise ValueError(f"no rule makes {name}")
    return makers[own_name]


def _router(plan: Upcycling, name: str) -> Tensor:
    """[E, D]: the initial weights of a new model; in slices, one row for all experts of a copy."""
    moe, R = plan.moe, plan.n_routed_slices
    rows = moe.n_experts if moe.top_k % R else moe.n_experts // R
    weight = torch.empty(rows, plan.model.d_model)
    init_shard(name, weight, (0, 0), (rows, plan.model.d_model), plan.model, plan.seed)
    return weight.repeat_interleave(moe.n_experts // rows, dim=0)


def _gate_up(plan: Upcycling, dense: TensorReader, mlp: str) -> Tensor:
    """[E, 2F, D]: of each expert the gate's rows, then those of up."""
    F, R = plan.moe.d_ff, plan.n_routed_slices
    out = torch.empty(plan.moe.n_experts, 2, F, plan.model.d_model)
    for i, matrix in enumerate(GATE_UP):
        weight = dense.read(f"{mlp}.{matrix}.weight")
        slices = weight.view(plan.n_slices, F, -1)[plan.moe.n_shared_experts :]
        for e, expert in enumerate(out[:, i]):
            expert.copy_(slices[e % R])
        _add_noise(plan, out[:, i], weight, f"{mlp}.{matrix}", mlp)
    return out.flatten(1, 2)


def _down(plan: Upcycling, dense: TensorReader, mlp: str) -> Tensor:
    """[E, D, F]."""
    F, R = plan.moe.d_ff, plan.n_routed_slices
    weight = dense.read(f"{mlp}.down_proj.weight") * plan.output_scale
    out = torch.empty(plan.moe.n_experts, plan.model.d_model, F)
    for e, expert in enumerate(out):
        first = (plan.moe.n_shared_experts + e % R) * F
        expert.copy_(weight[:, first : first + F])
    _add_noise(plan, out.transpose(1, 2), weight, f"{mlp}.down_proj", mlp)
    return out


def _shared(plan: Upcycling, dense: TensorReader, mlp: str, matrix: str) -> Tensor:
    """A matrix of the shared experts: the first slices. A gate begins as sigmoid(0) = 1/2, for which `down_proj` makes
    up."""
    weight, width = dense.read(f"{mlp}.{matrix}.weight"), plan.moe.shared_d_ff
    if matrix in GATE_UP:
        return weight[:width].clone()
    return weight[:, :width] * (2.0 if plan.moe.shared_expert_gate else 1.0)


def _add_noise(plan: Upcycling, experts_EFD: Tensor, dense: Tensor, name: str, mlp: str) -> None:
    """Draw some hidden features of each expert anew, in place; the same ones in all its matrices.

    Args:
        plan: says how many.
        experts_EFD: [E, F, D], a view of the experts' matrices with the hidden features second.
        dense: the dense matrix, scaled as they are.
        name: of the dense matrix; it selects the random numbers.
        mlp: name of the layer's MLP; it selects the features.
    """
    E, F, D = experts_EFD.shape
    count = round(plan.noise_fraction * F)
    if not count:
        return
    mean, std = dense.mean(dtype=torch.float64).item(), dense.double().std().item() if dense.numel() > 1 else 0.0
    for e in range(E):
        features = random_stream(f"upcycle/{mlp}/{e}", plan.seed).permutation(F)[:count]
        drawn = random_stream(f"upcycle/{name}/{e}", plan.seed).standard_normal((count, D), dtype="float32")
        experts_EFD[e, torch.from_numpy(features)] = torch.from_numpy(drawn) * std + mean
