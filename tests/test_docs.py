"""The documentation is true where a program can tell: links, names, the drawing of the packages, settings, the site."""

import json
import pydoc
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import networkx as nx
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from docs.draw_architecture import DRAWING, ROOMS, arrows, draw, imports
from docs.mkdocs_hooks import paragraph, settings_reference
from pretrain.config import AUTO, RunConfig, flatten, walk
from pretrain.config.loading import load
from pretrain.errors import UserError

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "benchmarks", "docs", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
SECTIONS = "|".join(RunConfig.model_fields)
PACKAGES = "pretrain|parallel|data_pipeline|launch|configs|tests|benchmarks|docs"
PARAMETERS = ("model.layers", "model.embed_tokens", "model.norm")
ENDINGS = ("py", "yaml", "yml", "md", "jsonl", "json", "html", "txt", "toml", "log", "zst", "gz", "bin", "idx")


def inline(tokens: list[Token]) -> Iterator[Token]:
    """Every token, those inside of paragraphs too."""
    for token in tokens:
        yield token
        yield from inline(token.children or [])


def parse(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def links(page: Path) -> list[str]:
    """Where the links and images of a page lead, except to other hosts."""
    found = (token.attrGet("href") or token.attrGet("src") for token in inline(parse(page)))
    return [str(link) for link in found if link and "://" not in str(link) and not str(link).startswith("mailto:")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them; the site's own rule is checked by its build."""
    tokens = parse(page)
    titles = (after.content for token, after in pairwise(tokens) if token.type == "heading_open")
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(pages: list[Path], root: Path) -> list[str]:
    """Each link whose file or anchor does not exist, as `page: link`."""
    broken: list[str] = []
    for page in pages:
        for link in links(page):
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(root)}: {link}")
    return broken


def test_every_link_leads_somewhere() -> None:
    assert len(PAGES) >= 12
    assert sum(len(links(page)) for page in PAGES) >= 15
    assert broken_links(PAGES, ROOT) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A title, with `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[right](other.md#a-title-with-code) [host](https://example.org/none) `[code](none.md)`\n\n"
        "[file](none.md) [anchor](other.md#none) ![image](none.png) [own](#none)\n"
    )
    wrong = ["none.md", "other.md#none", "none.png", "#none"]
    assert broken_links([page], tmp_path) == [f"page.md: {link}" for link in wrong]


def test_the_site_builds_without_a_warning_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert {"index.html", "CONTRIBUTING.html", "data.html", "reference/settings.html"} <= set(pages)
    loaded = r"""<(?:script|img|iframe|source)[^>]*\bsrc=["']?(?:https?:)?//|<link[^>]*\bhref=["']?(?:https?:)?//"""
    for name, html in pages.items():
        assert not re.search(loaded, html), name
        assert 'class="mermaid"' not in html, f"{name}: a browser would fetch mermaid.js to draw it"


def test_a_page_that_is_not_there_fails_the_build(tmp_path: Path) -> None:
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True, nav=[{"None": "none.md"}])
    with pytest.raises(Abort):
        build(config)


def test_every_setting_is_in_the_reference_with_its_default_and_its_sentence() -> None:
    reference, defaults = settings_reference(), flatten(RunConfig())
    assert len(defaults) > 100
    for key, field in walk():
        entry = reference.partition(f"#### `{key}` ")[2].partition("\n#")[0]
        default = '"auto"' if field.default == AUTO else json.dumps(defaults[key])
        assert f"default `{default}`" in entry, key
        assert field.description, key
        assert paragraph(field.description) in entry, key
    assert "#### `data.sources.N.kind` " in reference


def code_words(page: Path) -> list[str]:
    """What a page writes as code, in paragraphs and in blocks, except for blocks that tests/test_guides.py runs."""
    tokens = (token for token in inline(parse(page)) if token.type in ("code_inline", "fence", "code_block"))
    return [token.content for token in tokens if "title=" not in token.info]


GUIDES = [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md") and ROOT / "tests" not in page.parents]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_names_settings_targets_and_files_that_exist(page: Path) -> None:
    assert wrong_names(code_words(page)) == []


def wrong_names(words: list[str]) -> list[str]:
    """Settings, targets of make, files and Python names in these words that do not exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    keys = {key for key, _ in walk()}
    known = {*keys, *(key[: match.start()] for key in keys for match in re.finditer(r"\.", key))}
    wrong: list[str] = []
    for text in words:
        if text.endswith("?") and "is not a setting" in text:  # an example of an error
            continue
        for name in re.findall(rf"(?<![\w./-])(?:{PACKAGES}|{SECTIONS})(?:\.[A-Za-z_]\w*)+(?![\w(*/-])", text):
            if name in known or name.startswith(PARAMETERS) or name.rpartition(".")[2] in ENDINGS:
                continue
            if pydoc.locate(name) is None:
                wrong.append(name)
        wrong += [f"make {name}" for name in re.findall(r"\bmake ([a-z][a-z-]+)", text) if name not in targets]
        for name in re.findall(rf"(?<![\w./~-])(?:{PACKAGES})/[\w./-]*\w\.(?:py|md|yaml|svg)\b", text):
            wrong += [] if (ROOT / name).exists() else [name]
    return wrong


def test_a_name_that_does_not_exist_is_found() -> None:
    right = ["train.steps data.mixture", "make test", "runs/x/none.py", "pretrain.train.run.train", "tests/conftest.py"]
    wrong = ["train.stepz", "make tset", "parallel/none.py", "pretrain.train.run.none"]
    assert wrong_names(right) == []
    assert sorted(wrong_names([" ".join(["train.stepz=5", *wrong[1:]])])) == sorted(wrong)


def yaml_blocks() -> list[tuple[Path, str]]:
    tokens = ((page, token) for page in GUIDES for token in inline(parse(page)))
    return [(page, token.content) for page, token in tokens if token.type == "fence" and token.info == "yaml"]


def test_every_example_of_a_config_loads(tmp_path: Path) -> None:
    blocks = yaml_blocks()
    assert len(blocks) >= 3
    for number, (page, text) in enumerate(blocks):
        file = tmp_path / f"{number}-{page.stem}.yaml"
        file.write_text(text)
        load(file, [])


def test_an_example_with_a_wrong_setting_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml_blocks()[0][1].replace("data:", "dota:", 1))
    with pytest.raises(UserError, match="dota"):
        load(tmp_path / "wrong.yaml", [])


def drawn() -> tuple[set[str], set[tuple[str, str]]]:
    """The rooms and the arrows of docs/architecture.svg."""
    elements = list(ET.parse(DRAWING).iter())
    return (
        {room for e in elements if (room := e.get("data-room"))},
        {(start, e.attrib["data-to"]) for e in elements if (start := e.get("data-from"))},
    )


def untrue(drawing: set[tuple[str, str]], real: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Arrows that are no import, and imports that no arrows lead along."""
    reachable = set(nx.transitive_closure(nx.DiGraph(drawing)).edges)
    return (drawing - real) | (real - reachable)


def test_the_drawing_of_the_architecture_is_what_the_imports_are() -> None:
    rooms, drawing = drawn()
    real = imports()
    assert rooms == set(ROOMS)
    assert {room for edge in real for room in edge} <= rooms
    again = "draw it again: python -m docs.draw_architecture"
    assert untrue(drawing, real) == set(), again
    assert nx.is_directed_acyclic_graph(nx.DiGraph(drawing))
    assert DRAWING.read_text() == draw(arrows(real)), again


def test_an_arrow_too_many_and_one_too_few_are_found() -> None:
    _, drawing = drawn()
    real = imports()
    missing, wrong = ("pretrain.cli", "pretrain.train"), ("pretrain.model", "pretrain.cli")
    assert missing in untrue(drawing - {missing}, real)
    assert untrue(drawing | {wrong}, real) == {wrong}
