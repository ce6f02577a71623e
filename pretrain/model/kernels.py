"""Variable-length attention kernels for CUDA, and the choice among all kernels. Kernels are imported on first use.

A kernel takes documents laid end to end: q [X, H, K] of X = B*S queries, k and v [Y, G, K] of Y = B*T keys, the
`Documents` that they form, and the window. It returns [X, H, K]. A document's queries are the last of its tokens, so
the last query sees all of its keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic  # documented, but `torch.compiler` does not have it
from torch.nn.attention.varlen import varlen_attn


class Documents(NamedTuple):
    """Where documents end among the queries and among the keys. Some documents have keys and no queries."""

    query_ends_N: Tensor
    """0, then the end of every document, int32 [N + 1]."""

    key_ends_N: Tensor

    longest: Tensor
    """A tensor without elements, whose shape is (most queries of a document, most keys of a document, 0): upper bounds.

    torch.compile treats an int as a constant and makes a new graph for each value. A size that is marked dynamic is a
    variable.
    """

    @classmethod
    def of(cls, query_ends_N: Tensor, key_ends_N: Tensor, most_queries: int, most_keys: int) -> Documents:
        """Make documents with these upper bounds."""
        return cls(query_ends_N, key_ends_N, torch.empty(most_queries, most_keys, 0))

    def mark_dynamic(self) -> Documents:
        """Let one compiled graph serve any number and length of documents. A copy of the tensors needs new marks."""
        # Not `mark_dynamic`: that raises where the compiler needs a constant after all, and one more graph is no harm.
        maybe_mark_dynamic(self.query_ends_N, 0)
        maybe_mark_dynamic(self.key_ends_N, 0)
        maybe_mark_dynamic(self.longest, [0, 1])
        return self


VarlenKernel = Callable[[Tensor, Tensor, Tensor, Documents, int | None], Tensor]

# In torch 2.11 the flash kernel accepts grouped heads and has no argument for it. Later versions need the argument.
_varlen_attn: Callable[..., Tensor | tuple[Tensor, ...]] = (
    partial(varlen_attn, enable_gqa=True) if "enable_gqa" in inspect.signature(varlen_attn).parameters else varlen_attn
)


def varlen(q_XHK: Tensor, k_YGK: Tensor, v_YGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """PyTorch's own variable-length flash attention (torch.nn.attention.varlen)."""
    left = -1 if window is None else window - 1  # tokens to the left, without the query itself
    most_queries, most_keys, _ = documents.longest.shape
    ends = documents.query_ends_N, documents.key_ends_N
    return _output(_varlen_attn(q_XHK, k_YGK, v_YGK, *ends, most_queries, most_keys, window_size=(left, 0)))


# The compiler cannot trace all of versions 3 and 4. A graph break a block costs microseconds.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
def flash_attn(q_XHK: Tensor, k_YGK: Tensor, v_YGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """The flash-attn package, in the newest version that runs on this GPU."""
    version = flash_attn_version(q_XHK.device.index or 0)
    if version is None:
        raise ValueError(
            "attention=flash_attn needs the flash-attn package, version 2, 3 or 4; install it or use attention=varlen"
        )
    unlimited = None if version == 4 else -1
    most_queries, most_keys, _ = documents.longest.shape
    out = _flash_attn_function(version)(
        q_XHK,
        k_YGK,
        v_YGK,
        cu_seqlens_q=documents.query_ends_N,
        cu_seqlens_k=documents.key_ends_N,
        max_seqlen_q=most_queries,
        max_seqlen_k=most_keys,
        causal=True,
        window_size=(unlimited, unlimited) if window is None else (window - 1, 0),
    )
    return _output(out)


def _output(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The attention's output. flash-attn 4 and early releases of 3 return the log-sum-exp as well."""
    return out[0] if isinstance(out, tuple) else out


VARIABLE_LENGTH: dict[str, VarlenKernel] = {"varlen": varlen, "flash_attn": flash_attn}
"""Kernels that take the ends of documents. `sdpa` and `blocked` take rows; `attention` calls them itself."""

_FLASH_ATTN_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


@cache
def _flash_attn_function(version: int) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    function: Callable[..., Tensor | tuple[Tensor, ...]] = import_module(
        _FLASH_ATTN_MODULES[version]
    ).flash_attn_varlen_func
    return function


@cache
def flash_attn_version(device_index: int = 0) -> int | None:
    """The version of flash-attn to use on that GPU: 3 on Hopper, 4 on Hopper and newer, 2 from Ampere on; None if
    there is none."""
    generation = torch.cuda.get_device_capability(device_index)[0]
    candidates = {8: (2,), 9: (3, 4, 2)}.get(generation, (4, 2) if generation > 9 else ())
    return next((version for version in candidates if _importable(version)), None)


def _importable(version: int) -> bool:
    """Whether the package is installed and loads. One built for another torch raises an ImportError or OSError."""
    try:
        if find_spec(_FLASH_ATTN_MODULES[version]) is None:
            return False
        _flash_attn_function(version)
    except (ImportError, OSError, AttributeError):
        return False
    return True


def available_backends(device: str, *, precision: str, compiled: bool, head_dim: int) -> dict[str, str]:
    """The kernels that run with this precision (`bf16` or `fp32`) on this device (`cpu` or `cuda`): {name: reason},
    fastest first."""
    found = {}
    generation = torch.cuda.get_device_capability()[0] if device == "cuda" else 0
    if generation >= 8 and precision == "bf16" and head_dim <= 256 and head_dim % 8 == 0:
        version = flash_attn_version()
        if version in (3, 4):
            found["flash_attn"] = f"the flash-attn package is installed, in version {version}"
        found["varlen"] = "PyTorch's flash kernels for packed documents do no masked work"
        if version == 2:  # the same kernel as PyTorch's own, with a graph break
            found["flash_attn"] = "the flash-attn package is installed, in version 2"
    if device == "cpu" and compiled:
        found["blocked"] = "blocks of matrix products, compiled, beat PyTorch's CPU kernel"
    return found | {"sdpa": "PyTorch's scaled_dot_product_attention runs everywhere"}


def choose_backend(device: str, *, precision: str, compiled: bool, head_dim: int) -> tuple[str, str]:
    """The fastest kernel for this precision on this device, and the reason in a few words."""
    return next(iter(available_backends(device, precision=precision, compiled=compiled, head_dim=head_dim).items()))
