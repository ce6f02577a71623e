"""Tensor and sequence parallelism (arXiv:1909.08053, arXiv:2205.05198): a module's own plan says how its matrices are split.

Every parameter becomes a DTensor on the "tensor" mesh, so that FSDP2 can shard it further and checkpoints know its place. What is computed
with are plain tensors: a split module is of a subclass of its class, in which `weight` is this rank's part, and whose forward pass has
the collectives around it. Kernels and the compiler meet no DTensor but where a collective is.

| word                 | weight        | before                     | after                       |
|----------------------|---------------|----------------------------|-----------------------------|
| `vocab_parallel_embedding`    | rows          | ids of other ranks give 0  | sum over the ranks          |
| `sequence`           | whole         |                            |                             |
| `gather_sequence`    |               | sequence gathered          |                             |
| `colwise`            | rows          |                            |                             |
| `kv_colwise`         | rows          |                            |                             |
| `replicated_with_grad_allreduce`              | whole         |                            |                             |
| `rowwise`   | columns       |                            | sum over the ranks          |
| `vocab_parallel_head` | rows          |                            |                             |

(`colwise` is said of the product x W', whose columns are the rows of W.) With `sequence` a sum leaves each rank its part of the sequence
(reduce-scatter), without it all of it (all-reduce). Shape suffixes: B batch, S sequence, D model width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._symmetric_memory import enable_symm_mem_for_group  # see there: no public name has its effect
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from parallel.errors import LayoutError
from parallel.vocabulary import HasLinearLoss, vocab_parallel_loss

Forward = Callable[..., Tensor]


def apply_tensor_parallel(
    module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str], *, sequence: bool, replicate_kv: bool
) -> None:
    """Split a model, or a part of one, over the ranks of the one-dimensional `mesh`, in place.

    Args:
        module: best on the meta device: with values, each rank keeps its part of its own. Afterwards it takes and gives plain tensors, ids
            [b, S], and between parts and blocks [b, S/t, D] with `sequence`, else [b, S, D]. A `linear_loss` that it has takes such hidden
            states and whole labels.
        mesh: t ranks.
        plan: module-name pattern -> word of the table above; `*` stands for one name. It is the plan of a whole model: a module that
            is None here is another part's.
        sequence: what is not split otherwise is split along the sequence, which t has to divide.
        replicate_kv: where t is more than the key/value heads, several ranks may hold and compute the same one.

    Raises ValueError for an unknown word, a pattern that finds nothing, a parameter that no pattern finds, and sizes that t cannot divide.
    """
    ranks = _Ranks(mesh, sequence, replicate_kv)
    classes: dict[
        tuple[object, ...], type[nn.Module]
    ] = {}  # few: a class of its own for each layer would be compiled anew
    for pattern, word in plan.items():
        if word not in _STYLES:
            raise ValueError(f"the plan says {word!r} for {pattern}; words are {', '.join(_STYLES)}")
        for name, parent, part in list(_find(module, pattern)):
            role = _STYLES[word](ranks, parent, part)
            _distribute(part, role, ranks, name)
            key = type(part), word, *(name for name, _ in part.named_parameters(recurse=False))
            if key not in classes:
                classes[key] = _subclass(part, role, mesh)
            part.__class__ = classes[key]
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ValueError(f"the plan has no pattern for {name}")
    if hasattr(module, "linear_loss"):
        losing = cast(HasLinearLoss, module)
        losing.linear_loss = vocab_parallel_loss(losing.linear_loss, mesh.get_group(), ranks.gather)


def enable_async(mesh: DeviceMesh) -> None:
    """Let compiled blocks overlap the gathers and scatters of `mesh` with the products beside them (async tensor parallelism).

    Raises LayoutError off CUDA: there is no symmetric memory.
    """
    if mesh.device_type != "cuda":
        raise LayoutError(
            f"parallel.async_tensor=true needs CUDA, and this run is on {mesh.device_type}; set it to false"
        )
    import torch._inductor.config as inductor  # slow to import, and no public name: the option exists nowhere else in 2.11 to 2.13

    inductor._micro_pipeline_tp = True
    _enable_symmetric_memory(mesh)


def _enable_symmetric_memory(mesh: DeviceMesh) -> None:
    """Groups have had it by themselves since 2.11, and PyTorch says so; but its compiler leaves a group alone that is not on this list."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)


@dataclass(frozen=True)
class _Ranks:
    """The ranks of the mesh, and the collectives between them. DTensor makes the backward passes of these."""

    mesh: DeviceMesh
    sequence: bool
    replicate_kv: bool

    def gather(self, x_BSD: Tensor) -> Tensor:
        """What lies between blocks -> all of the sequence, for products that are split over the ranks: gradients are summed."""
        held: Placement = Shard(1) if self.sequence else Replicate()
        whole = DTensor.from_local(x_BSD, self.mesh, [held], run_check=False).redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    def reduce(self, x_BSD: Tensor) -> Tensor:
        """Each rank's addend -> the sum, as it lies between blocks."""
        held: Placement = Shard(1) if self.sequence else Replicate()
        return (
            DTensor.from_local(x_BSD, self.mesh, [Partial()], run_check=False)
            .redistribute(placements=[held])
            .to_local()
        )


class ParallelStyle(NamedTuple):
    """What a word makes of a module."""

    weight: Placement = Replicate()
    """Where the module's own parameters are."""

    gradient: Placement = Replicate()
    """What a rank's gradient of its part is: `Partial` has to be summed over the ranks, which FSDP2 does when it reduces."""

    rows: slice | None = None
    """Rows of its part that a rank computes with; None is all."""

    wrap: Callable[[Forward], Forward] | None = None
    """Forward of the class -> forward of the split module; both are called with the module first."""


def _vocab_parallel_embedding(ranks: _Ranks, _: nn.Module, __: nn.Module) -> ParallelStyle:
    n_ranks, rank = ranks.mesh.size(), ranks.mesh.get_local_rank()

    def embed(module: nn.Module, ids_BS: Tensor) -> Tensor:
        if ranks.sequence and ids_BS.shape[1] % n_ranks:
            raise ValueError(f"{ids_BS.shape[1]} tokens of a sequence cannot be shared out to {n_ranks} tensor ranks")
        weight_RD = cast(Tensor, module.weight)
        row_BS = ids_BS - rank * len(weight_RD)
        elsewhere_BS = (row_BS < 0) | (row_BS >= len(weight_RD))
        x_BSD = F.embedding(row_BS.masked_fill(elsewhere_BS, 0), weight_RD)
        return ranks.reduce(x_BSD.masked_fill(elsewhere_BS[..., None], 0))

    return ParallelStyle(Shard(0), Shard(0), wrap=lambda _: embed)


def _rows(_: _Ranks, __: nn.Module, ___: nn.Module) -> ParallelStyle:
    return ParallelStyle(Shard(0), Shard(0))


def _kv_rows(ranks: _Ranks, parent: nn.Module, part: nn.Module) -> ParallelStyle:
    """Whole heads each; where there are fewer heads than ranks, ranks that follow one another share one, as their queries do."""
    head_dim, width, n_ranks = cast(int, parent.head_dim), cast(nn.Linear, part).out_features, ranks.mesh.size()
    n_heads = width // head_dim
    if n_heads % n_ranks == 0:
        return ParallelStyle(Shard(0), Shard(0))
    if not ranks.replicate_kv or n_ranks % n_heads:
        raise ValueError(
            f"{n_heads} key/value heads cannot be shared out to {n_ranks} ranks with replicate_kv={ranks.replicate_kv}"
        )
    first = ranks.mesh.get_local_rank() * n_heads // n_ranks * head_dim
    return ParallelStyle(Replicate(), Partial(), rows=slice(first, first + head_dim))


def _heads(_: _Ranks, __: nn.Module, ___: nn.Module) -> ParallelStyle:
    return ParallelStyle(Replicate(), Partial())


def _sequence(ranks: _Ranks, _: nn.Module, __: nn.Module) -> ParallelStyle:
    return ParallelStyle(Replicate(), Partial() if ranks.sequence else Replicate())


def _gather_sequence(ranks: _Ranks, _: nn.Module, __: nn.Module) -> ParallelStyle:
    def wrap(forward: Forward) -> Forward:
        return lambda module, x_BSD, *rest, **named: forward(module, ranks.gather(x_BSD), *rest, **named)

    return ParallelStyle(wrap=wrap)


def _rowwise(ranks: _Ranks, _: nn.Module, part: nn.Module) -> ParallelStyle:
    if getattr(part, "bias", None) is not None:
        raise ValueError("rowwise cannot split a module with a bias: it would be added once a rank")

    def wrap(forward: Forward) -> Forward:
        return lambda module, x: ranks.reduce(forward(module, x))

    return ParallelStyle(Shard(1), Shard(1), wrap=wrap)


_STYLES: dict[str, Callable[[_Ranks, nn.Module, nn.Module], ParallelStyle]] = {
    "vocab_parallel_embedding": _vocab_parallel_embedding,
    "sequence_parallel": _sequence,
    "gather_sequence": _gather_sequence,
    "colwise": _rows,
    "kv_colwise": _kv_rows,
    "replicated_with_grad_allreduce": _heads,
    "rowwise": _rowwise,
    "vocab_parallel_head": _rows,
}
"""Word of a plan -> (ranks, the module above, the module) -> role."""


def _find(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, module above, module) of all that the pattern names. Raises ValueError for a name that is not even there as None."""
    found = [("", module, module)]
    for word in pattern.split("."):
        below: list[tuple[str, nn.Module, nn.Module]] = []
        for path, _, above in found:
            if word != "*" and not hasattr(above, word):
                raise ValueError(f"the plan's pattern {pattern} finds nothing: {path or 'the model'} has no {word!r}")
            children = above.named_children() if word == "*" else [(word, getattr(above, word))]
            below += [(f"{path}.{name}".lstrip("."), above, child) for name, child in children if child is not None]
        found = below
    yield from found


def _distribute(part: nn.Module, role: ParallelStyle, ranks: _Ranks, name: str) -> None:
    """Turn the parameters of `part` itself into DTensors."""
    for key, parameter in list(part.named_parameters(recurse=False)):
        n_ranks = ranks.mesh.size()
        if isinstance(role.weight, Shard) and parameter.shape[role.weight.dim] % n_ranks:
            size, what = parameter.shape[role.weight.dim], ("rows", "columns")[role.weight.dim]
            raise ValueError(f"{name}.{key}: {size} {what} cannot be shared out to {n_ranks} ranks")
        # Of a rank's own values: nothing is sent.
        whole = distribute_tensor(parameter.detach(), ranks.mesh, [role.weight], src_data_rank=None)
        part.register_parameter(key, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _subclass(part: nn.Module, role: ParallelStyle, mesh: DeviceMesh) -> type[nn.Module]:
    """The class of `part` with the attributes that its role gives it; its parameters stay what they are in `parameters()`."""
    base = type(part)
    members: dict[str, object] = {key: _local(key, role, mesh) for key, _ in part.named_parameters(recurse=False)}
    if role.wrap is not None:
        members["forward"] = role.wrap(base.forward)
    return type(f"Split{base.__name__}", (base,), members)


def _local(key: str, role: ParallelStyle, mesh: DeviceMesh) -> property:
    """An attribute that is this rank's part of the parameter of that name, a plain tensor; while FSDP2 has it sharded, the parameter."""

    def read(module: nn.Module) -> Tensor:
        parameter = cast(DTensor, module._parameters[key])
        if parameter.device_mesh != mesh:
            return parameter
        part = parameter.to_local(grad_placements=[role.gradient])
        return part if role.rows is None else part[role.rows]  # not [:], whose backward pass copies the gradient

    return property(read)
