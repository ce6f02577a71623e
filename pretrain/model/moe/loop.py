"""The experts one after the other: the plain form that the grouped matrix products are tested against.

It reads the group sizes on the host. Training uses it only with expert dropout, which is for fine-tuning.
Shape suffixes: X rows, E experts, D model width, F hidden width of an expert, H = 2F.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loop_swiglu(
    x_XD: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    weight_X: Tensor,
    offsets_E: Tensor,
    scale_XF: Tensor | None = None,
) -> Tensor:
    """Return [X, D]: weight * down(silu(gate(x)) * up(x) * scale) of each row; 0 behind the last group."""
    outs, start = [], 0
    for e, end in enumerate(offsets_E.tolist()):
        rows = slice(start, end)
        gate, up = F.linear(x_XD[rows], gate_up_EHD[e]).chunk(2, dim=-1)
        hidden = F.silu(gate.float()) * up.float() * weight_X[rows, None]
        if scale_XF is not None:
            hidden = hidden * scale_XF[rows]
        outs.append(F.linear(hidden.to(x_XD.dtype), down_EDF[e]))
        start = end
    outs.append(x_XD.new_zeros(len(x_XD) - start, x_XD.shape[1]))
    return torch.cat(outs)
