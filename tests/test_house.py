"""Rules that docs/architecture.md and CONTRIBUTING.md state and that neither ruff nor import-linter checks."""

import ast
from importlib.resources import files
from pathlib import Path

import grimp
import networkx as nx
import pytest

HOUSE = Path(__file__).parents[1]
PACKAGES = ("pretrain", "data_pipeline", "parallel", "launch")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "docs/architecture.md")
MOST_FILES = 13
"""Python files in a folder of `pretrain`."""

SOURCES = sorted(file for package in PACKAGES for file in (HOUSE / package).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module that a file names in an import, wherever it stands, and what it takes from it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_model_names_no_process_group() -> None:
    files = [file for file in SOURCES if file.is_relative_to(HOUSE / "pretrain" / "model")]
    assert len(files) >= 10
    for file in files:
        assert not {name for name in imports(file) if name.startswith("torch.distributed")}, file
        assert "torch.distributed" not in file.read_text(), file


def test_a_hidden_import_is_seen(tmp_path: Path) -> None:
    for line in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
    ):
        (tmp_path / "bad.py").write_text(f"def f():\n    {line}\n")
        assert any(name.startswith("torch.distributed") for name in imports(tmp_path / "bad.py")), line


@pytest.mark.parametrize("room", [*PACKAGES, "configs", "tests", "benchmarks", "docs", "pyproject.toml", *DOCUMENTS])
def test_the_room_is_there_and_not_empty(room: str) -> None:
    path = HOUSE / room
    assert path.stat().st_size > 0
    assert path.is_file() or any(file.is_file() for file in path.rglob("*"))


def test_the_configs_that_are_loaded_are_ours() -> None:
    found = files("configs") / "demo.yaml"
    assert found.is_file(), f"another package named `configs` hides ours: {files('configs')}"
    assert found.read_bytes() == (HOUSE / "configs" / "demo.yaml").read_bytes(), f"not our demo.yaml: {found}"


def test_a_file_is_read_in_one_sitting() -> None:
    lengths = {file.relative_to(HOUSE): len(file.read_text().splitlines()) for file in SOURCES}
    assert len(lengths) > 50
    assert {str(file): lines for file, lines in lengths.items() if lines > 400} == {}


def test_a_function_is_seen_on_one_screen() -> None:
    long = {
        f"{file.relative_to(HOUSE)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None and node.end_lineno - node.lineno + 1 >= 60
    }
    assert long == {}


def test_a_source_says_what_it_is() -> None:
    for file in SOURCES:
        assert ast.get_docstring(ast.parse(file.read_text())), file


def circles(graph: grimp.ImportGraph) -> list[set[str]]:
    """Groups of modules that import each other, wherever in a file the import stands."""
    edges = ((module, to) for module in graph.modules for to in graph.find_modules_directly_imported_by(module))
    return [group for group in nx.strongly_connected_components(nx.DiGraph(edges)) if len(group) > 1]


def test_no_imports_go_in_a_circle() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert len(graph.modules) > 100
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert graph.direct_import_exists(importer="pretrain.model.architectures.llama", imported="pretrain.model.mlp")
    graph.add_import(importer="pretrain.model.mlp", imported="pretrain.model.architectures.llama")
    assert {"pretrain.model.mlp", "pretrain.model.architectures.llama"} in circles(graph)


def test_a_folder_has_few_files() -> None:
    folders = {file.parent for file in SOURCES if file.is_relative_to(HOUSE / "pretrain")}
    assert len(folders) >= 10
    counts = {str(folder.relative_to(HOUSE)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}
