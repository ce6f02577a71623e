"""Private names of torch are used in parallel/torch_compat.py only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parents[2]
PRODUCTION = [file for package in ("parallel", "pretrain", "launch") for file in (ROOT / package).rglob("*.py")]
COMPAT = ROOT / "parallel" / "torch_compat.py"

MODEL_MAY_USE = {
    "torch.utils._pytree.tree_map_only",  # a mask is a nested tuple of tensors, and nothing public maps over one
    "torch._dynamo.maybe_mark_dynamic",  # torch documents it under this name
    "torch._C._autograd._get_current_graph_task_keep_graph",  # save_for_backward() would keep its tensors too long
}
"""`pretrain.model` may not import `parallel`, so it uses these by itself."""

NOT_TORCH = {"_replace", "_asdict", "_fields", "_exit"}
"""Private by their spelling alone: of named tuples and of `os`."""


def own_names(files: list[Path]) -> set[str]:
    """The names of functions, classes and attributes that our code defines, without those of torch's classes."""
    names = set[str]()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return (
        names
        - {name for kind in (Tensor, DeviceMesh, DTensor, FSDPModule) for name in dir(kind)}
        - set(vars(nn.Module()))
    )


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_torch_names(source: str, own: set[str]) -> Iterator[str]:
    """Private names that the source imports from torch, reads from torch, or reads from any object that is not ours."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names if n.name.split(".")[0] == "torch" and is_private(n.name))
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "torch":
                yield from (name for n in names if is_private(name := f"{module}.{n.name}"))
            case ast.Attribute(value=value, attr=attr) if is_private(attr) and attr not in own | NOT_TORCH:
                path = ast.unparse(value)
                if path not in ("self", "cls", "super()"):
                    yield f"{path}.{attr}"


def found(file: Path, own: set[str]) -> list[str]:
    names = set(private_torch_names(file.read_text(), own))
    # The chain torch._C._autograd._name holds shorter chains.
    longest = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    if file.is_relative_to(ROOT / "pretrain" / "model"):
        longest -= MODEL_MAY_USE
    return sorted(longest)


def test_production_code_uses_no_private_name_of_torch() -> None:
    own = own_names(PRODUCTION)
    assert {str(f.relative_to(ROOT)): names for f in PRODUCTION if f != COMPAT and (names := found(f, own))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from torch._dynamo import config",
        "from torch.distributed.tensor import _redistribute",
        "from torch.distributed.tensor._utils import compute_local_shape_and_global_offset",
        "import torch._inductor.config as inductor",
        "def f():\n    from torch.testing._internal.distributed.fake_pg import FakeStore",
        "torch._foreach_norm(gradients)",
        "torch.ops._c10d_functional.wait_tensor(x)",
        "mesh._unflatten(2, (1, 1))",
        "mesh.root()._get_root_mesh()",
        "module._parameters['weight']",
    ],
)
def test_a_private_name_of_torch_is_found(line: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(line)
    assert found(file, own_names(PRODUCTION)) != []


def test_every_workaround_says_with_which_versions_it_was_checked() -> None:
    tree = ast.parse(COMPAT.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert len(functions) > 10
    for function in functions:
        documentation = ast.get_docstring(function) or ""
        assert "Checked with" in documentation or "See `all_gather_tensor`" in documentation, function.name


def test_production_code_patches_nothing_with_a_test_library() -> None:
    assert [file for file in PRODUCTION if "unittest" in file.read_text()] == []
