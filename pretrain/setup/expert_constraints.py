"""Constraints on layouts of a mixture of experts: who holds which expert, and how its tokens are divided."""

from __future__ import annotations

from importlib.util import find_spec

from pretrain.config import RunConfig
from pretrain.setup.constraints import Violation, divisors, format_choices


def expert_ranks_need_experts(config: RunConfig) -> Violation | None:
    """Expert axes divide experts."""
    for name in ("expert", "expert_tensor"):
        size = getattr(config.parallel, name)
        if size > 1 and not config.model.moe.n_experts:
            return Violation(f"parallel.{name}={size} divides experts, and this model has none", "use 1")
    return None


def expert_divides_experts(config: RunConfig) -> Violation | None:
    """Expert ranks get equally many experts."""
    expert, n_experts = config.parallel.expert, config.model.moe.n_experts
    if n_experts % expert == 0:
        return None
    return Violation(
        f"parallel.expert={expert} does not divide model.moe.n_experts={n_experts}",
        f"use {format_choices(divisors(n_experts))}",
    )


def expert_tensor_divides_width(config: RunConfig) -> Violation | None:
    """Ranks that split an expert get equal parts of its hidden width."""
    size, width = config.parallel.expert_tensor, config.model.moe.d_ff
    if size == 1 or width % size == 0:
        return None
    return Violation(
        f"parallel.expert_tensor={size} does not divide model.moe.d_ff={width}",
        f"use {format_choices(divisors(width))}",
    )


def experts_fold(config: RunConfig) -> Violation | None:
    """Expert axes are folded out of the ranks that hold different tokens of the same layers and replica."""
    parallel = config.parallel
    ranks, folded = parallel.shard * parallel.context * parallel.tensor, parallel.expert * parallel.expert_tensor
    if ranks % folded == 0:
        return None
    return Violation(
        f"parallel.expert={parallel.expert} x parallel.expert_tensor={parallel.expert_tensor} = {folded} does not "
        f"divide the {ranks} ranks of parallel.shard={parallel.shard} x parallel.context={parallel.context} x "
        f"parallel.tensor={parallel.tensor}",
        f"use a product of {format_choices(divisors(ranks))}",
    )


def tensor_divides_tokens(config: RunConfig) -> Violation | None:
    """Tensor ranks divide the tokens of a layer with experts, also without sequence parallelism."""
    parallel, seq_len = config.parallel, config.data.seq_len
    if not config.model.moe.n_experts or seq_len % (parallel.context * parallel.tensor) == 0:
        return None
    multiple = parallel.context * parallel.tensor * (2 if parallel.context > 1 else 1)
    part = f" / parallel.context={parallel.context}" if parallel.context > 1 else ""
    return Violation(
        f"data.seq_len={seq_len}{part} is not divisible by parallel.tensor={parallel.tensor}, and tensor ranks divide "
        f"the tokens of layers with experts",
        f"use a multiple of {multiple}, such as {-(-seq_len // multiple) * multiple}",
    )


def deepep_is_possible(config: RunConfig) -> Violation | None:
    """DeepEP is an optional package with kernels for bf16 on GPUs."""
    parallel, train = config.parallel, config.train
    if parallel.expert_dispatch != "deepep":
        return None
    needed = {
        "the package deep_ep": find_spec("deep_ep") is not None,
        "parallel.expert above 1": parallel.expert > 1,
        "train.device=cuda": train.device == "cuda",
        "train.precision=bf16": train.precision == "bf16",
        "model.moe.expert_dropout=0": config.model.moe.expert_dropout == 0,
    }
    missing = [name for name, is_there in needed.items() if not is_there]
    if not missing:
        return None
    return Violation(
        f"parallel.expert_dispatch=deepep also needs {', '.join(missing)}",
        "set that, or parallel.expert_dispatch=all_to_all",
    )


EXPERT_CONSTRAINTS = (
    expert_ranks_need_experts,
    expert_divides_experts,
    expert_tensor_divides_width,
    experts_fold,
    tensor_divides_tokens,
    deepep_is_possible,
)
"""In the order in which they are checked."""
