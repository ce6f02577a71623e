"""The experts' SwiGLU on rows that are sorted by expert: six grouped matrix products for the two passes.

    h = x Wgu',  y = (w * silu(h_gate) * h_up) Wd'      with the weights Wgu, Wd of the row's expert

The forward pass keeps x and h. The backward pass computes the activation again from h, which costs little beside the
products. The elementwise parts are plain PyTorch, so that torch.compile fuses them. The products are two operators:

- `pretrain::grouped_mm`: each group of rows times its own matrix (outputs, and gradients of inputs);
- `pretrain::grouped_weight_grad`: for each group the product of two sets of its rows (gradients of weights).

On CUDA they are torch's `grouped_mm`. It takes bf16, widths that are multiples of 16 bytes, and compute capability 8.0.
From 9.0 (H100) on, no group size reaches the host; on 8.x (A100) torch itself reads them and loops. Everything else on
CUDA (fp32, odd widths) is a loop over the groups here, which waits for the device to read their sizes.

On CPUs they are a loop too. In fp32 torch's `grouped_mm` would be as fast. In bf16 it is not: oneDNN compiles a kernel
for each new size of a matrix and keeps 1,024 of them, a learned router brings new group sizes every step, and to
compile takes a third of the time of the product itself (docs/LOG.md). So the loop multiplies a few rows more than the
group has, such that an octave has 16 sizes, and drops their results. These rows are neighbours of the group in the
same buffer: nothing is copied or padded.

Rows past the last group (`offsets_E[-1]`) may hold anything in inputs and outputs, also inf and NaN.

Shape suffixes: X rows, E experts (groups), D model width, F hidden width of an expert, H = 2F, I input and O output
width of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SIZES_PER_OCTAVE = 16
"""Numbers of rows between n and 2n that products in half precision have on CPUs: at most 6% too many, 3% on average."""

SMALLEST_SIZE = 16

HALF = (torch.bfloat16, torch.float16)


def grouped_swiglu(x_XD: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor, weight_X: Tensor, offsets_E: Tensor) -> Tensor:
    """Apply to each row the SwiGLU of its expert, and multiply its hidden activations by the row's weight.

    Args:
        x_XD: rows sorted by expert.
        gate_up_EHD: the matrices of gate (first half of H) and up (second half), as `transformers` stacks them.
        down_EDF: the matrices back to the model width.
        weight_X: fp32, the routing weight of each row.
        offsets_E: int32, the end of each expert's rows. It does not decrease, and may end before X.

    Returns:
        [X, D] in x's dtype. Differentiable in all but the offsets.
    """
    inputs = x_XD, gate_up_EHD, down_EDF, weight_X, offsets_E
    y_XD: Tensor = _GroupedSwiGLU.apply(*inputs)  # type: ignore[no-untyped-call]  # untyped in torch
    return y_XD


class _GroupedSwiGLU(torch.autograd.Function):
    """`grouped_swiglu` with a backward pass that recomputes the activation."""

    @staticmethod
    def forward(
        ctx: Any,  # Any: torch's context takes any attribute
        x_XD: Tensor,
        gate_up_EHD: Tensor,
        down_EDF: Tensor,
        weight_X: Tensor,
        offsets_E: Tensor,
    ) -> Tensor:
        h_XH = grouped_mm(x_XD, gate_up_EHD.transpose(1, 2), offsets_E)
        gate_XF, up_XF = h_XH.chunk(2, dim=-1)
        hidden_XF = (F.silu(gate_XF) * up_XF * weight_X[:, None]).to(x_XD.dtype)
        ctx.save_for_backward(x_XD, gate_up_EHD, down_EDF, weight_X, offsets_E, h_XH)
        y_XD: Tensor = grouped_mm(hidden_XF, down_EDF.transpose(1, 2), offsets_E)
        return y_XD

    @staticmethod
    def backward(ctx: Any, grad_y_XD: Tensor) -> tuple[Tensor | None, ...]:  # Any: as above
        x_XD, gate_up_EHD, down_EDF, weight_X, offsets_E, h_XH = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down = ctx.needs_input_grad[:3]
        grad_y_XD = grad_y_XD.contiguous()  # grouped_mm on CUDA takes no expanded tensors
        gate_XF, up_XF = h_XH.chunk(2, dim=-1)
        silu_XF = F.silu(gate_XF)
        product_XF = silu_XF * up_XF

        grad_down_EDF = None
        if needs_down:
            hidden_XF = (product_XF * weight_X[:, None]).to(x_XD.dtype)
            grad_down_EDF = grouped_weight_grad(grad_y_XD, hidden_XF, offsets_E)

        grad_hidden_XF = grouped_mm(grad_y_XD, down_EDF, offsets_E)
        grad_weight_X = (grad_hidden_XF * product_XF).sum(-1, dtype=weight_X.dtype)
        grad_product_XF = (grad_hidden_XF * weight_X[:, None]).to(x_XD.dtype)
        grad_gate_XF = torch.ops.aten.silu_backward(grad_product_XF * up_XF, gate_XF)
        grad_h_XH = torch.cat((grad_gate_XF, grad_product_XF * silu_XF), -1)
        return (
            grouped_mm(grad_h_XH, gate_up_EHD, offsets_E) if needs_x else None,
            grouped_weight_grad(grad_h_XH, x_XD, offsets_E) if needs_gate_up else None,
            grad_down_EDF,
            grad_weight_X,
            None,
        )


@torch.library.custom_op("pretrain::grouped_mm", mutates_args=())
def grouped_mm(x_XI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """Multiply each row by the matrix of its group, [X, I] -> [X, O]. Not differentiable."""
    if _cuda_can(x_XI, weight_EIO):
        return F.grouped_mm(x_XI, weight_EIO, offs=offsets_E)
    y_XO = x_XI.new_empty(x_XI.shape[0], weight_EIO.shape[2])
    for group, weight_IO in zip(_groups(offsets_E, x_XI), weight_EIO.unbind(), strict=True):
        if group.first == group.start:  # the groups to which the extra rows belong come later and overwrite them
            torch.mm(x_XI[group.window], weight_IO, out=y_XO[group.window])
        else:
            y_XO[group.rows] = torch.mm(x_XI[group.window], weight_IO)[group.rows_in_window]
    return y_XO


@torch.library.custom_op("pretrain::grouped_weight_grad", mutates_args=())
def grouped_weight_grad(grad_XO: Tensor, x_XI: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum the outer products of the two sets of rows over each group, -> [E, O, I]. Not differentiable."""
    if _cuda_can(grad_XO, x_XI):
        return _weight_grad_on_cuda(grad_XO, x_XI, offsets_E)
    product_EOI = x_XI.new_empty(offsets_E.shape[0], grad_XO.shape[1], x_XI.shape[1])
    groups = list(_groups(offsets_E, x_XI))
    most = max(group.last - group.first for group in groups)
    padded_grad_MO, padded_x_MI = (rows.new_empty(most, rows.shape[1]) for rows in (grad_XO, x_XI))
    for group, product_OI in zip(groups, product_EOI.unbind(), strict=True):
        grad_MO, x_MI = grad_XO[group.rows], x_XI[group.rows]
        if group.rows != group.window:  # extra rows would add to the sum
            size = group.last - group.first
            grad_MO, x_MI = _pad(grad_MO, padded_grad_MO[:size]), _pad(x_MI, padded_x_MI[:size])
        torch.mm(grad_MO.T, x_MI, out=product_OI)
    return product_EOI


@grouped_mm.register_fake
def _(x_XI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    return x_XI.new_empty(x_XI.shape[0], weight_EIO.shape[2])


@grouped_weight_grad.register_fake
def _(grad_XO: Tensor, x_XI: Tensor, offsets_E: Tensor) -> Tensor:
    return x_XI.new_empty(offsets_E.shape[0], grad_XO.shape[1], x_XI.shape[1])


class _Group(NamedTuple):
    """Rows [start, end) of a group, and the rows [first, last) that are multiplied."""

    start: int
    end: int
    first: int
    last: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    @property
    def window(self) -> slice:
        return slice(self.first, self.last)

    @property
    def rows_in_window(self) -> slice:
        return slice(self.start - self.first, self.end - self.first)


def _groups(offsets_E: Tensor, x_XI: Tensor) -> Iterator[_Group]:
    ends = offsets_E.tolist()
    n_rows, start = ends[-1], 0
    for end in ends:
        size = _rounded_size(end - start) if x_XI.dtype in HALF and x_XI.device.type == "cpu" else end - start
        if size > n_rows:
            size = end - start
        first = min(start, n_rows - size)
        yield _Group(start, end, first, first + size)
        start = end


def _rounded_size(n_rows: int) -> int:
    """Round up to one of the sizes 16, 32, 48, ..., 256, 272, ..., 512, 544, ..., 1024, 1088, ..."""
    octave = 1 << (n_rows - 1).bit_length()  # the next power of two
    step = max(octave // 2 // SIZES_PER_OCTAVE, SMALLEST_SIZE)
    return -(-n_rows // step) * step


def _pad(rows_NI: Tensor, padded_MI: Tensor) -> Tensor:
    """Copy the rows into the buffer, and zeros into the rest of it."""
    n_rows = rows_NI.shape[0]
    padded_MI[:n_rows] = rows_NI
    padded_MI[n_rows:] = 0
    return padded_MI


def _cuda_can(*factors: Tensor) -> bool:
    """Whether torch's kernel for groups takes these tensors: bf16, rows of a multiple of 16 bytes, SM80 or newer."""
    first = factors[0]
    if first.device.type != "cuda" or first.dtype != torch.bfloat16:
        return False
    widths = [size for factor in factors for size in factor.shape[1:]]
    return all(width % 8 == 0 for width in widths) and torch.cuda.get_device_capability(first.device) >= (8, 0)


def _weight_grad_on_cuda(grad_XO: Tensor, x_XI: Tensor, offsets_E: Tensor) -> Tensor:
    product_EOI = F.grouped_mm(grad_XO.T, x_XI, offs=offsets_E)
    # The kernel leaves the matrix of an empty group unwritten on some GPUs (pytorch#172439).
    is_empty_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
    return product_EOI.masked_fill_(is_empty_E[:, None, None], 0)


# torch's FlopCounterMode counts the rows of all groups, as if none lay past the last group.
@register_flop_formula(torch.ops.pretrain.grouped_mm)
def _(x_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
    return 2 * x_shape.numel() * weight_shape[2]


@register_flop_formula(torch.ops.pretrain.grouped_weight_grad)
def _(grad_shape: torch.Size, x_shape: torch.Size, *_: object, **__: object) -> int:
    return 2 * grad_shape.numel() * x_shape[1]
