"""The guides in docs/extend work: a copy of the code gets the edits that a guide shows, then the guide's check runs.

The title of a block names its file. `python title="FILE"` is a new file. `diff title="FILE"` is an edit: its unchanged
and removed lines must stand in the file exactly once. The last block, `python title="check.py"`, is run.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "data_pipeline", "launch", "parallel", "pretrain")
GUIDES = sorted(page for page in (ROOT / "docs" / "extend").glob("*.md") if "title=" in page.read_text())
CHECK = "check.py"


@dataclass(frozen=True)
class Block:
    """A titled block of code."""

    language: str
    title: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        title = re.search(r'title="([^"]+)"', token.info)
        if token.type == "fence" and title:
            yield Block(token.info.split()[0], title[1], token.content)


def apply(block: Block, root: Path) -> None:
    """Write the file, or edit it."""
    file = root / block.title
    if block.language == "diff":
        lines = block.text.splitlines(keepends=True)
        before = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
        after = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
        text = file.read_text()
        assert text.count(before) == 1, f"{block.title} has these lines {text.count(before)} times:\n{before}"
        file.write_text(text.replace(before, after))
    else:
        assert not file.exists(), f"{block.title} is there already"
        file.write_text(block.text)


def copy_code(to: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, to / package)
    return to


def run_check(root: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, CHECK]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_does_what_it_says(page: Path, tmp_path: Path) -> None:
    root, found = copy_code(tmp_path), list(blocks(page))
    assert [block.title for block in found][-1] == CHECK
    for block in found:
        apply(block, root)
    done = run_check(root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_check_fails_without_the_edits_of_its_guide(tmp_path: Path) -> None:
    root = copy_code(tmp_path)
    *_, check = blocks(ROOT / "docs" / "extend" / "filter.md")
    apply(check, root)
    done = run_check(root)
    assert done.returncode != 0
    assert "uppercase" in done.stderr


def test_an_edit_of_lines_that_are_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one\ntwo\none\n")
    for before in ("three", "one"):
        with pytest.raises(AssertionError, match=r"has these lines [02] times"):
            apply(Block("diff", "a.py", f" {before}\n+more\n"), tmp_path)
    apply(Block("diff", "a.py", " one\n-two\n+TWO\n"), tmp_path)
    assert (tmp_path / "a.py").read_text() == "one\nTWO\none\n"
