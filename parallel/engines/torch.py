"""The native engine, in one process: plain PyTorch on one CPU or one GPU.

Weights are kept in fp32 (the masters: what the optimizer updates and checkpoints hold). Under bf16 the module itself holds bf16 copies
of them, made once a step; each gradient is added to its master's fp32 gradient and freed as soon as it is complete, so that
accumulation over microbatches is exact to fp32 and no cast is repeated. Static memory is 2 + 4 + 4 + 8 = 18 bytes a parameter with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from parallel.engine import BuildOptimizer, ComputeLoss, Microbatch, State, StepResult


class TorchEngine:
    """`Engine` over an initialised fp32 module on its device."""

    def __init__(
        self, model: nn.Module, compute_loss: ComputeLoss, build_optimizer: BuildOptimizer, *, dtype: torch.dtype, clip: float | None
    ) -> None:
        self.model = model
        self._compute_loss = compute_loss
        self._clip = float("inf") if clip is None else clip
        self._masters = dict(model.named_parameters()) if dtype == torch.float32 else _split_masters(model, dtype)
        self._copies: list[Tensor] = [] if dtype == torch.float32 else list(model.parameters())
        self._optimizer = build_optimizer(self._masters.items())

    def train_step(self, microbatches: Sequence[Microbatch], lr_scale: float) -> StepResult:
        """One optimizer step; the loss is averaged over the targets of all microbatches together, however they are spread."""
        n_targets = max(1, sum(microbatch.n_targets for microbatch in microbatches))
        cross_entropy, z_loss = self._zero(), self._zero()
        for microbatch in microbatches:
            sums = self._compute_loss(self.model, microbatch)
            (sums.total / n_targets).backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
            cross_entropy += sums.cross_entropy.detach()
            z_loss += sums.z_loss.detach()
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        nn.utils.clip_grads_with_norm_(self._masters.values(), self._clip, norm, foreach=True)
        result = StepResult(cross_entropy.item() / n_targets, z_loss.item() / n_targets, norm.item())
        if result.is_finite:  # weights that met a NaN are lost; the loop decides what happens next
            self._optimizer.set_lr(lr_scale)
            self._optimizer.step()
            self.loaded()
        self._optimizer.zero_grad()
        return result

    @torch.no_grad()
    def eval_step(self, microbatch: Microbatch) -> tuple[float, int]:
        """(sum of the cross-entropy in nats, number of targets)."""
        return self._compute_loss(self.model, microbatch).cross_entropy.item(), microbatch.n_targets

    def state(self) -> State:
        """Live fp32 masters and optimizer state by canonical name."""
        model: dict[str, Tensor | dict[str, Tensor]] = {name: master.detach() for name, master in self._masters.items()}
        return {"model": model, "optimizer": dict(self._optimizer.state())}

    @torch.no_grad()
    def loaded(self) -> None:
        """Bring the compute copies up to the masters."""
        if self._copies:
            masters: list[Tensor] = list(self._masters.values())
            torch._foreach_copy_(self._copies, masters)  # no public name; a loop of copy_() does the same, slower

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(iter(self._masters.values())).device)


def _split_masters(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Turn the module's parameters into copies of `dtype`; return the fp32 ones, which collect the gradients."""
    masters = {name: nn.Parameter(parameter.detach()) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)  # new memory: what it had is the master's alone from here on
        parameter.register_post_accumulate_grad_hook(_collect_into(masters[name]))  # type: ignore[no-untyped-call]  # untyped in torch
    return masters


def _collect_into(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Hook: add a finished gradient to the master's, and free it."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return hook
