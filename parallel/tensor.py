"""Tensor and sequence parallelism (arXiv:1909.08053, arXiv:2205.05198): a model's plan names a style for each module.

Every parameter becomes a DTensor on the "tensor" mesh, so that FSDP2 can shard it further and checkpoints know where
it lies. The passes compute with plain tensors: a parallelized module is of a subclass of its class, whose `weight` is
this rank's shard and whose forward has the collectives around it. Kernels and the compiler meet DTensors only in
collectives.

| style                           | weight      | before the module                | after the module     |
|---------------------------------|-------------|----------------------------------|----------------------|
| `vocab_parallel_embedding`      | rows        | ids of other ranks look up 0     | sum over the ranks   |
| `sequence_parallel`             | replicated  |                                  |                      |
| `gather_sequence`               |             | all-gather of the sequence       |                      |
| `colwise`                       | rows        |                                  |                      |
| `kv_colwise`                    | rows        |                                  |                      |
| `qk_norm`                       | replicated  |                                  |                      |
| `replicated_with_grad_allreduce`| replicated  |                                  |                      |
| `rowwise`                       | columns     |                                  | sum over the ranks   |
| `vocab_parallel_head`           | rows        |                                  |                      |
| `split_tokens`                  |             | split of the sequence            | all-gather of it     |
| `experts`                       | untouched   |                                  |                      |

Column-wise and row-wise are said of x W', whose columns are the rows of W. With sequence parallelism the sum is a
reduce-scatter along the sequence, else an all-reduce. A `qk_norm` sees only a rank's own heads, and
`replicated_with_grad_allreduce` is for weights that see only its own tokens: gradients are summed over the ranks. If a
`qk_norm` normalizes all heads together, the ranks exchange their mean squares inside the module. `split_tokens` is for
a mixture of experts, where each tensor rank computes other tokens; with sequence parallelism it has nothing to do.
`parallel.expert` splits `experts`.

Shape suffixes: B batch, S sequence, D model width, V vocabulary rows of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from parallel.collectives import all_gather
from parallel.errors import LayoutError
from parallel.torch_compat import enable_micro_pipeline_tp, enable_symmetric_memory, registered_parameter
from parallel.vocabulary import HasLinearLoss, vocab_parallel_loss

Forward = Callable[..., Tensor]


def apply_tensor_parallel(
    module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str], *, sequence: bool, replicate_kv: bool
) -> None:
    """Parallelize a model, or a chunk of one, over the ranks of a 1-D mesh, in place.

    Args:
        module: best on the meta device. With values, each rank keeps its shard of its own values. Afterwards it takes
            and returns plain tensors: ids [b, S], and between blocks [b, S/t, D] with `sequence`, else [b, S, D]. A
            `linear_loss` takes such hidden states and full labels.
        mesh: t ranks.
        plan: module-name pattern -> style of the table above, for a full model. `*` stands for one name. A module that
            is None belongs to another chunk.
        sequence: split along the sequence what is not split otherwise. t must divide the sequence.
        replicate_kv: with more ranks than key/value heads, several ranks may hold and compute the same head.

    Raises:
        ValueError: an unknown style, a pattern that matches nothing, a parameter that no pattern matches, or a size
            that t does not divide.
    """
    ranks = _TensorRanks(mesh, sequence, replicate_kv)
    untouched: set[nn.Parameter] = set()
    # One class for many layers: the compiler would compile each class anew.
    classes: dict[tuple[object, ...], type[nn.Module]] = {}
    for pattern, style_name in plan.items():
        if style_name not in (*_STYLES, _EXPERTS):
            raise ValueError(f"the plan says {style_name!r} for {pattern}; styles are {', '.join(_STYLES)}, {_EXPERTS}")
        for name, parent, child in list(_match(module, pattern)):
            if style_name == _EXPERTS:
                untouched.update(child.parameters())
                continue
            style = _STYLES[style_name](ranks, parent, child)
            _distribute_parameters(child, style, mesh, name)
            key = type(child), style_name, str(style.rows), *dict(child.named_parameters(recurse=False))
            if key not in classes:
                classes[key] = _make_subclass(child, style, mesh)
            child.__class__ = classes[key]
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor) and parameter not in untouched:
            raise ValueError(f"the plan has no pattern for {name}")
    if hasattr(module, "linear_loss"):
        has_loss = cast(HasLinearLoss, module)
        has_loss.linear_loss = vocab_parallel_loss(has_loss.linear_loss, mesh.get_group(), ranks.gather)


def enable_async(mesh: DeviceMesh) -> None:
    """Async tensor parallelism: let compiled blocks overlap the collectives of `mesh` with matrix products.

    Raises:
        LayoutError: not on CUDA, where there is no symmetric memory.
    """
    if mesh.device_type != "cuda":
        raise LayoutError(
            f"parallel.async_tensor=true needs CUDA, and this run is on {mesh.device_type}; set it to false"
        )
    enable_micro_pipeline_tp()
    enable_symmetric_memory(mesh.get_group().group_name)


@dataclass(frozen=True)
class _TensorRanks:
    """The ranks of the mesh, and the collectives between them. DTensor makes the backward passes of these."""

    mesh: DeviceMesh
    sequence: bool
    replicate_kv: bool

    @property
    def _between_blocks(self) -> Placement:
        return Shard(1) if self.sequence else Replicate()

    def gather(self, x_BSD: Tensor) -> Tensor:
        """Activations between blocks -> the full sequence, as input of products that are split over the ranks.

        Gradients are summed over the ranks.
        """
        x = DTensor.from_local(x_BSD, self.mesh, [self._between_blocks], run_check=False)
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def reduce(self, x_BSD: Tensor) -> Tensor:
        """Sum the addends of the ranks. The result is placed as activations between blocks are."""
        x = DTensor.from_local(x_BSD, self.mesh, [Partial()], run_check=False)
        return x.redistribute(placements=[self._between_blocks]).to_local()

    def split_tokens(self, x_BSD: Tensor) -> Tensor:
        """The full sequence, the same on all ranks -> this rank's part. Gradients are concatenated."""
        if x_BSD.shape[1] % self.mesh.size():
            raise ValueError(
                f"{x_BSD.shape[1]} tokens of a sequence cannot be shared out to {self.mesh.size()} tensor ranks"
            )
        x = DTensor.from_local(x_BSD, self.mesh, [Replicate()], run_check=False)
        return x.redistribute(placements=[Shard(1)]).to_local()

    def join_tokens(self, x_BSD: Tensor) -> Tensor:
        """Undo `split_tokens`."""
        x = DTensor.from_local(x_BSD, self.mesh, [Shard(1)], run_check=False)
        return x.redistribute(placements=[Replicate()]).to_local()


class ParallelStyle(NamedTuple):
    """What a style makes of a module."""

    weight: Placement = Replicate()
    """Placement of the module's own parameters."""

    gradient: Placement = Replicate()
    """Placement of a rank's gradient. FSDP2 sums a `Partial` one over the ranks when it reduces."""

    rows: slice | None = None
    """Rows of its shard that a rank computes with; None is all."""

    wrap: Callable[[Forward], Forward] | None = None
    """Forward of the class -> forward of the subclass. Both take the module first."""

    method: str = "forward"
    """The method that `wrap` replaces."""


def _vocab_parallel_embedding(ranks: _TensorRanks, _: nn.Module, __: nn.Module) -> ParallelStyle:
    n_ranks, rank = ranks.mesh.size(), ranks.mesh.get_local_rank()

    def embed(module: nn.Module, ids_BS: Tensor) -> Tensor:
        if ranks.sequence and ids_BS.shape[1] % n_ranks:
            raise ValueError(f"{ids_BS.shape[1]} tokens of a sequence cannot be shared out to {n_ranks} tensor ranks")
        weight_VD = cast(Tensor, module.weight)
        row_BS = ids_BS - rank * len(weight_VD)
        other_rank_BS = (row_BS < 0) | (row_BS >= len(weight_VD))
        x_BSD = F.embedding(row_BS.masked_fill(other_rank_BS, 0), weight_VD)
        return ranks.reduce(x_BSD.masked_fill(other_rank_BS[..., None], 0))

    return ParallelStyle(Shard(0), Shard(0), wrap=lambda _: embed)


def _colwise(_: _TensorRanks, __: nn.Module, ___: nn.Module) -> ParallelStyle:
    return ParallelStyle(Shard(0), Shard(0))


def _kv_colwise(ranks: _TensorRanks, attention: nn.Module, projection: nn.Module) -> ParallelStyle:
    """Full heads per rank. With fewer heads than ranks, consecutive ranks share a head, as their queries do."""
    head_dim, width = cast(int, attention.head_dim), cast(nn.Linear, projection).out_features
    n_ranks, n_heads = ranks.mesh.size(), width // head_dim
    if n_heads % n_ranks == 0:
        return ParallelStyle(Shard(0), Shard(0))
    if not ranks.replicate_kv or n_ranks % n_heads:
        raise ValueError(
            f"{n_heads} key/value heads cannot be shared out to {n_ranks} ranks with replicate_kv={ranks.replicate_kv}"
        )
    return ParallelStyle(Replicate(), Partial(), rows=_rows_of_heads(ranks, n_heads, head_dim))


def _qk_norm(ranks: _TensorRanks, attention: nn.Module, norm: nn.Module) -> ParallelStyle:
    """A norm over each head, or over all heads: then a rank computes with the weights of its heads."""
    head_dim, width = cast(int, attention.head_dim), len(registered_parameter(norm, "weight"))
    if width == head_dim:
        return ParallelStyle(Replicate(), Partial())

    def wrap(mean_square: Forward) -> Forward:
        # Ranks have equally many heads, or share heads equally: the mean of the ranks' means is that of all heads.
        return lambda module, x: all_gather(mean_square(module, x), ranks.mesh.get_group(), -1).mean(-1, keepdim=True)

    rows = _rows_of_heads(ranks, width // head_dim, head_dim)
    return ParallelStyle(Replicate(), Partial(), rows=rows, wrap=wrap, method="mean_square")


def _replicated_with_grad_allreduce(_: _TensorRanks, __: nn.Module, ___: nn.Module) -> ParallelStyle:
    return ParallelStyle(Replicate(), Partial())


def _rows_of_heads(ranks: _TensorRanks, n_heads: int, head_dim: int) -> slice:
    """Where a rank's heads lie among all. With fewer heads than ranks, consecutive ranks share one."""
    n_ranks = ranks.mesh.size()
    first = ranks.mesh.get_local_rank() * n_heads // n_ranks * head_dim
    return slice(first, first + max(1, n_heads // n_ranks) * head_dim)


def _sequence_parallel(ranks: _TensorRanks, _: nn.Module, __: nn.Module) -> ParallelStyle:
    return ParallelStyle(Replicate(), Partial() if ranks.sequence else Replicate())


def _gather_sequence(ranks: _TensorRanks, _: nn.Module, __: nn.Module) -> ParallelStyle:
    def wrap(forward: Forward) -> Forward:
        return lambda module, x_BSD, *args, **kwargs: forward(module, ranks.gather(x_BSD), *args, **kwargs)

    return ParallelStyle(wrap=wrap)


def _split_tokens(ranks: _TensorRanks, _: nn.Module, __: nn.Module) -> ParallelStyle:
    def wrap(forward: Forward) -> Forward:
        return lambda module, x_BSD, *args, **kwargs: ranks.join_tokens(
            forward(module, ranks.split_tokens(x_BSD), *args, **kwargs)
        )

    return ParallelStyle(wrap=None if ranks.sequence else wrap)


def _rowwise(ranks: _TensorRanks, _: nn.Module, projection: nn.Module) -> ParallelStyle:
    if getattr(projection, "bias", None) is not None:
        raise ValueError("rowwise cannot split a module with a bias: it would be added once a rank")

    def wrap(forward: Forward) -> Forward:
        return lambda module, x: ranks.reduce(forward(module, x))

    return ParallelStyle(Shard(1), Shard(1), wrap=wrap)


_STYLES: dict[str, Callable[[_TensorRanks, nn.Module, nn.Module], ParallelStyle]] = {
    "vocab_parallel_embedding": _vocab_parallel_embedding,
    "sequence_parallel": _sequence_parallel,
    "gather_sequence": _gather_sequence,
    "colwise": _colwise,
    "kv_colwise": _kv_colwise,
    "qk_norm": _qk_norm,
    "replicated_with_grad_allreduce": _replicated_with_grad_allreduce,
    "rowwise": _rowwise,
    "vocab_parallel_head": _colwise,
    "split_tokens": _split_tokens,
}
"""Name of a style -> (ranks, the parent module, the module) -> style."""

_EXPERTS = "experts"
"""The style of what `parallel.expert` splits."""


def _match(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, parent, module) of all modules that match the pattern, without those that are None.

    Raises:
        ValueError: a name of the pattern is no attribute, not even as None.
    """
    found = [("", module, module)]
    for word in pattern.split("."):
        matches: list[tuple[str, nn.Module, nn.Module]] = []
        for path, _, parent in found:
            if word != "*" and not hasattr(parent, word):
                raise ValueError(f"the plan's pattern {pattern} finds nothing: {path or 'the model'} has no {word!r}")
            children = parent.named_children() if word == "*" else [(word, getattr(parent, word))]
            matches += [(f"{path}.{name}".lstrip("."), parent, child) for name, child in children if child is not None]
        found = matches
    yield from found


def _distribute_parameters(module: nn.Module, style: ParallelStyle, mesh: DeviceMesh, name: str) -> None:
    """Turn the module's own parameters into DTensors."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(style.weight, Shard) and parameter.shape[style.weight.dim] % mesh.size():
            size, dimension = parameter.shape[style.weight.dim], ("rows", "columns")[style.weight.dim]
            raise ValueError(f"{name}.{key}: {size} {dimension} cannot be shared out to {mesh.size()} ranks")
        # Each rank takes its shard of its own values: nothing is sent.
        distributed = distribute_tensor(parameter.detach(), mesh, [style.weight], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(distributed, requires_grad=parameter.requires_grad))


def _make_subclass(module: nn.Module, style: ParallelStyle, mesh: DeviceMesh) -> type[nn.Module]:
    """A subclass of the module's class with the style's attributes and forward. `parameters()` stays as it is."""
    base = type(module)
    members: dict[str, object] = {
        key: _shard_property(key, style, mesh) for key, _ in module.named_parameters(recurse=False)
    }
    if style.wrap is not None:
        members[style.method] = style.wrap(getattr(base, style.method))
    return type(f"TensorParallel{base.__name__}", (base,), members)


def _shard_property(key: str, style: ParallelStyle, mesh: DeviceMesh) -> property:
    """A property: this rank's shard of a parameter as a plain tensor; while FSDP2 shards it, the parameter."""

    def read(module: nn.Module) -> Tensor:
        parameter = cast(DTensor, registered_parameter(module, key))
        if parameter.device_mesh != mesh:
            return parameter
        shard = parameter.to_local(grad_placements=[style.gradient])
        return shard if style.rows is None else shard[style.rows]  # not [:], whose backward pass copies the gradient

    return property(read)
