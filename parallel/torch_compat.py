"""Every private name of torch that production code uses, and every workaround for a limit of torch.

No other file of `parallel` or `pretrain` uses a private name of torch (tests/parallel/test_torch_compat.py), except
`pretrain.model`, which may not import this package; that test lists what it uses. Each entry says which public name is
missing and with which versions of torch it was checked: the tests run with 2.13 on CPUs, and ran with 2.11 on a GPU.
pyproject.toml allows 2.11 to 2.13. Names of operators in torch's dispatcher stand where they are counted
(`parallel.recompute`, `parallel.simulate.communication`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore as HashStore
from torch._C._distributed_c10d import _resolve_process_group
from torch._guards import active_fake_mode as active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed import pipelining
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store, _set_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import HSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.distributed.tensor import DTensor, _redistribute
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type as is_traceable_wrapper_subclass_type

# Names that are imported above to be used as they are:
#
# | name                                 | missing                                                    | checked      |
# |--------------------------------------|------------------------------------------------------------|--------------|
# | `HashStore`                          | type stubs of the public `torch.distributed.HashStore`     | 2.11, 2.13   |
# | `active_fake_mode`                   | a public function that tells which kind of mode is active  | 2.13         |
# | `FakeTensor`, `FakeTensorMode`       | a public module; torch documents them under this one       | 2.13         |
# | `TorchDispatchMode`                  | a public module; torch documents it under this one         | 2.13         |
# | `is_traceable_wrapper_subclass_type` | a test whether a type is a DTensor or similar subclass     | 2.13         |

# --- Device meshes and process groups -------------------------------------------------------------------------------


def unflatten_mesh(mesh: DeviceMesh, dim: int, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """`mesh` with dimension `dim` replaced by several.

    Missing: a public way to unflatten. Flattening is public, but torch is removing slices of a flattened dimension.
    Checked with 2.11 and 2.13. `dim` is a number because 2.11 does not take a name.
    """
    return mesh._unflatten(dim, sizes, names)


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The ranks of `mesh` as one dimension. Missing: a public name. Checked with 2.11 and 2.13."""
    return mesh._flatten(name)


def concatenate_meshes(*meshes: DeviceMesh) -> DeviceMesh:
    """A mesh with the dimensions of all of them, which have the same root. It makes no process groups.

    Missing: a public way to combine dimensions of two meshes; FSDP2 takes this one. Checked with 2.11 and 2.13.
    """
    return DeviceMesh._concatenate(list(meshes))


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that `mesh` was made of. Missing: a public property. Checked with 2.11 and 2.13."""
    return mesh._get_root_mesh()


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long a collective waits. Missing: a timeout for the groups of a mesh. Checked with 2.11 and 2.13."""
    _set_pg_timeout(timeout, group)


def find_process_group(name: str) -> dist.ProcessGroup:
    """The group of that name. Missing: a public lookup. Checked with 2.13."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # its type is a subclass of str


def clear_mesh_caches() -> None:
    """Make DTensor forget all meshes. Call it after a process group was destroyed if another may follow.

    DTensor caches its decisions by the shape of a mesh. It would take a mesh of the next group for an old one and use
    groups that are gone. The caches also keep gloo's threads alive.
    Missing: a public name that clears any of the three caches. Checked with 2.13.
    """
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # untyped in torch
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()


def fake_store() -> Store:
    """A store for the backend "fake", whose collectives return at once.

    Missing: a public way to register that backend. Importing this module does it. Checked with 2.13.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


# --- DTensors and parameters ----------------------------------------------------------------------------------------


def local_shape_and_offset(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's shard, and the index of its first element in the full tensor.

    Missing: a public name for where a shard lies. DTensor's checkpoints call this function; it handles FSDP over tensor
    parallelism. Checked with 2.11 and 2.13.
    """
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def local_tensor(tensor: DTensor) -> Tensor:
    """This rank's shard, read without an operator: a dispatch mode would see `to_local()`.

    Missing: such an accessor. Checked with 2.13.
    """
    return tensor._local_tensor


def registered_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The module's parameter of that name, even if its class has a property of the same name.

    Missing: `get_parameter` reads the attribute, so it would call the property. Checked with 2.11 and 2.13.
    """
    return cast(nn.Parameter, module._parameters[name])


# --- Operators ------------------------------------------------------------------------------------------------------

WAIT_TENSOR = torch.ops._c10d_functional.wait_tensor.default
"""The operator that a dispatch mode sees when code waits for a functional collective. Checked with 2.13."""

READ_SCALAR = torch.ops.aten._local_scalar_dense.default
"""The operator that a dispatch mode sees for `.item()`. Checked with 2.13."""


def all_gather_tensor(x: Tensor, size: int, group_name: str) -> Tensor:
    """All-gather along dimension 0. The result can be used at once: on CUDA the stream waits, not the host.

    Missing: a public functional collective. `torch.distributed._functional_collectives` is private as well. This holds
    for the next five functions, too. Checked with 2.11 and 2.13.
    """
    return wait_tensor(torch.ops._c10d_functional.all_gather_into_tensor(x, size, group_name))


def reduce_scatter_tensor(x: Tensor, size: int, group_name: str) -> Tensor:
    """Sum over the ranks and scatter along dimension 0. See `all_gather_tensor`."""
    return wait_tensor(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", size, group_name))


def all_reduce_tensor(x: Tensor, group_name: str) -> Tensor:
    """Sum over the ranks. See `all_gather_tensor`."""
    return wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group_name))


def all_to_all_tensor(x: Tensor, size: int, group_name: str) -> Tensor:
    """Exchange equal parts along dimension 0. See `all_gather_tensor`."""
    rows = [len(x) // size] * size
    return wait_tensor(torch.ops._c10d_functional.all_to_all_single(x, rows, rows, group_name))


def start_all_to_all(x: Tensor, received: list[int], sent: list[int], group_name: str) -> Tensor:
    """Start to exchange rows: `sent[r]` to rank r, `received[r]` from it. `wait_tensor` waits for the result.

    See `all_gather_tensor`.
    """
    out: Tensor = torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group_name)
    return out


def wait_tensor(x: Tensor) -> Tensor:
    """Wait for the result of a collective. On CUDA the stream waits, not the host. See `all_gather_tensor`."""
    out: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return out


def foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target. Missing: a public multi-tensor copy. Checked with 2.11 and 2.13."""
    torch._foreach_copy_(tuple(targets), tuple(sources))


def foreach_mul_(tensors: Sequence[Tensor], factor: float) -> None:
    """Scale in place, as torch's clip_grad_norm_ does. Missing: as for `foreach_copy_`. Checked with 2.11 and 2.13."""
    torch._foreach_mul_(tuple(tensors), factor)


def foreach_norm(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The 2-norm of each tensor, summed up in `dtype`. Missing: as for `foreach_copy_`. Checked with 2.11 and 2.13."""
    return torch._foreach_norm(tuple(tensors), 2, dtype=dtype)


# --- The compiler ---------------------------------------------------------------------------------------------------


def allow_recompilations(count: int) -> None:
    """Let torch.compile make at least `count` graphs of a function. Beyond the limit it would run uncompiled.

    Missing: a limit for one function; this one holds for the process. In 2.11 `torch.compiler.config` lacks it.
    Checked with 2.11 and 2.13.
    """
    from torch._dynamo import config as dynamo_config  # slow to import

    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, count)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
def mark_dynamic_rows(*tensors: Tensor) -> None:
    """Let one compiled graph serve any number of rows.

    Missing: `torch.compiler` has no such function; torch documents this one. Checked with 2.11 and 2.13.
    """
    from torch._dynamo import maybe_mark_dynamic  # slow to import

    for tensor in tensors:
        maybe_mark_dynamic(tensor, 0)


def enable_micro_pipeline_tp() -> None:
    """Let the compiler overlap gathers and scatters with the matrix products next to them.

    Missing: the option exists only in inductor's private settings. Checked with 2.11 to 2.13.
    """
    import torch._inductor.config as inductor_config  # slow to import

    inductor_config._micro_pipeline_tp = True


def enable_symmetric_memory(group_name: str) -> None:
    """Put a group on the list of those whose collectives the compiler may overlap.

    Groups have symmetric memory by default since 2.11, so torch warns that this call is deprecated. But its compiler
    still skips groups that are not on the list. Missing: a public name that writes it. Checked with 2.13.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group_name)  # type: ignore[arg-type]  # its type is a subclass of str


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


def fsdp_param_groups(root: FSDPModule) -> Iterator[_fsdp_param_group.FSDPParamGroup]:
    """FSDP2's groups of parameters that it gathers and reduces together, of all modules below the same root.

    A forward pass must have run: it finds the root.
    Missing: a public path to them. torch's pipelines take this one in `perform_reduce_grad`. Checked with 2.13.
    """
    for state in root._get_fsdp_state()._state_ctx.all_states:
        if state._fsdp_param_group is not None:
            yield state._fsdp_param_group


def unsharded_gradients(modules: Iterable[FSDPModule], accumulates: bool) -> Iterator[Tensor]:
    """Gradients that FSDP2 has accumulated and not yet reduced.

    Missing: a public path to them. Checked with 2.13.

    Args:
        modules: of one engine.
        accumulates: whether FSDP2 accumulates them over the microbatches of a step. If they have the dtype of the
            reduction, it leaves them in `.grad`, where autograd put them.
    """
    groups = {id(group): group for module in modules for group in fsdp_param_groups(module)}
    for group in groups.values():
        for parameter in group.fsdp_params:
            if parameter.unsharded_accumulated_grad is not None:
                yield parameter.unsharded_accumulated_grad
            elif accumulates and hasattr(parameter, "_unsharded_param"):  # was gathered at least once
                gradient = parameter.unsharded_param.grad
                if gradient is not None and gradient.dtype == torch.float32:
                    yield gradient


@contextmanager
def fsdp_resharding_over(mesh: DeviceMesh) -> Iterator[None]:
    """Inside, `fully_shard` with a number for `reshard_after_forward` reshards over dimension 1 of `mesh`.

    By default FSDP2 makes a mesh of its own for each module: two process groups per block. All ranks of the world must
    make groups in the same calls, but each pipeline stage and tensor rank would make others, and hang.
    Missing: an argument for an existing mesh. So this replaces, and then restores, the private function that finds the
    mesh and the private class of a parameter. Checked with 2.11 to 2.13, where both are alike.
    """
    mesh_info = HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    with (
        _replaced(_fully_shard, "_get_post_forward_mesh_info", lambda *_: mesh_info),
        _replaced(_fsdp_param_group, "FSDPParam", _TensorParallelFSDPParam),
    ):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


class _TensorParallelFSDPParam(FSDPParam):
    """A parameter that tensor parallelism may have sharded, and that FSDP2 reshards to a subset of its ranks.

    FSDP2 refuses to do that with a DTensor: it has no placement to show until the backward pass. Nobody looks at the
    placement then. The backward pass gathers the plain data, for a tensor shard as for a full parameter.
    """

    def to_sharded_post_forward(self) -> None:
        """Reshard as if the parameter were no DTensor."""
        is_dtensor, self.is_dtensor = self.is_dtensor, False
        try:
            super().to_sharded_post_forward()
        finally:
            self.is_dtensor = is_dtensor


# --- Pipelining -----------------------------------------------------------------------------------------------------


class PipelineStage(pipelining.PipelineStage):
    """torch's stage, but it never sends to its own rank.

    Before the first step 2.11 sends a message to each neighbouring stage. At the turn of a V the neighbour is on the
    same rank, which gloo refuses. Missing: an option to leave that out. Later versions do not call this method. Checked
    with 2.13.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.peer != dist.get_rank()]


def pipeline_order(
    schedule: type[PipelineScheduleMulti], *, n_ranks: int, stages_per_rank: int, n_microbatches: int
) -> dict[int, list[Any]]:  # Any: torch's actions have no public type
    """The actions of all ranks in a schedule with several stages per rank; None where a rank waits.

    Missing: a function that returns them. A schedule computes them when it is made, and reads no more of its stages
    than the attributes given here. Checked with 2.13.
    """
    n_stages = n_ranks * stages_per_rank
    stage: Any = SimpleNamespace(num_stages=n_stages, group_size=n_ranks, group_rank=0, submod=None)  # Any: no stage
    return schedule([stage] * stages_per_rank, n_microbatches).pipeline_order
