"""Build the optimizers of named fp32 master weights, with their state by canonical parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

from pretrain.config import OptimConfig
from pretrain.model.spec import ArchitectureSpec
from pretrain.optim.groups import ParameterGroup, group_parameters
from pretrain.optim.stacked_muon import StackedMuon


@dataclass(frozen=True)
class Optimizers:
    """Torch optimizers that step together, each over other parameters.

    Their state exists before the first step, so that a checkpoint can be loaded.
    """

    parts: tuple[Optimizer, ...]

    def set_lr(self, scale: float) -> None:
        """Set the learning rate of every group to `scale` times its peak."""
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["peak_lr"]

    def step(self) -> None:
        """Update all parameters that have a gradient."""
        for optimizer in self.parts:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return {parameter name: {slot: fp32 tensor}}; slots are `step`, `exp_avg`, `exp_avg_sq` or `momentum_buffer`.

        The next step reads and writes these tensors. To load a state, write into them.
        """
        return {name: dict(optimizer.state[parameter]) for optimizer, name, parameter in self._named()}

    def _named(self) -> Iterator[tuple[Optimizer, str, Tensor]]:
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    yield optimizer, name, parameter


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]], config: OptimConfig, architecture: ArchitectureSpec
) -> Optimizers:
    """Build the optimizers of `config.kind`. The learning rate is the peak until `set_lr` is called.

    AdamW is torch's fused kernel, on CPU and CUDA. Muon is torch's, with Nesterov momentum and five Newton-Schulz steps
    in bf16 (https://kellerjordan.github.io/posts/muon/); it takes the groups that the architecture marks for it.
    `StackedMuon` does the same with each matrix of stacked experts. Updates are scaled by 0.2 sqrt(max(rows, columns))
    to the size of AdamW's, so that one learning rate and one weight decay serve both (arXiv:2502.16982, section 2.2). A
    parameter without gradient keeps its value and its state, step counter included.
    """
    groups = group_parameters(named_parameters, architecture)
    by_muon = [group for group in groups if config.kind == "muon" and group.spec.muon]
    by_adamw = [group for group in groups if group not in by_muon]
    parts: list[Optimizer] = []
    if by_adamw:
        parts.append(
            AdamW(
                _torch_groups(by_adamw, config.lr, config.weight_decay), betas=config.betas, eps=config.eps, fused=True
            )
        )
    matrices = [group for group in by_muon if not group.spec.matrices_per_expert]
    experts = [group for group in by_muon if group.spec.matrices_per_expert]
    if matrices:
        torch_groups = _torch_groups(matrices, config.lr, config.weight_decay)
        parts.append(Muon(torch_groups, momentum=config.muon_momentum, nesterov=True, adjust_lr_fn="match_rms_adamw"))
    if experts:
        torch_groups = _torch_groups(experts, config.lr, config.weight_decay)
        parts.append(StackedMuon(torch_groups, momentum=config.muon_momentum))
    for optimizer in parts:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = _fresh_state(optimizer, parameter)
    return Optimizers(tuple(parts))


def _torch_groups(groups: list[ParameterGroup], peak_lr: float, weight_decay: float) -> list[dict[str, object]]:
    return [
        {
            "params": list(group.parameters.items()),
            "lr": peak_lr,
            "peak_lr": peak_lr,
            "weight_decay": weight_decay if group.spec.decays else 0.0,
            "matrices_per_expert": group.spec.matrices_per_expert,
        }
        for group in groups
    ]


def _fresh_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state that torch itself would make at the first step.

    The fused AdamW needs its step counter in fp32 on the device.
    """
    if isinstance(optimizer, Muon | StackedMuon):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
