"""Hooks of mkdocs (see mkdocs.yml): pages from outside of docs/, and the settings reference, made from the settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import pretrain.config as settings  # not its functions: mkdocs takes every name that begins with on_ for a hook

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
"""Files of the site that lie in the root of the repository; README.md is the first page."""

SETTINGS_PAGE = "reference/settings.md"

RESUME_NOTES = {
    "may": "may change on resume",
    "ahead": "may change on resume if no step already taken would differ",
    "never": "fixed for the run",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

Schema = dict[str, Any]  # Any: the values of a JSON schema


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/ as files."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, SETTINGS_PAGE, content=settings_reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between docs/ and the root of the repository: on the site both lie in one folder."""
    if page.file.src_uri in ROOT_PAGES:
        return markdown.replace("](docs/", "](")
    return re.sub(rf"\]\(\.\./((?:\.\./)*(?:{'|'.join(map(re.escape, ROOT_PAGES))}))", r"](\1", markdown)


def settings_reference() -> str:
    """Return the settings in Markdown: type, default and sentence of each, and what may change on resume."""
    schema = settings.RunConfig.model_json_schema()
    lines = [
        "# Settings",
        "",
        "Every setting with its default. A YAML file holds what differs; `key=value` on the command line wins.",
        "`pretrain train --help` lists them too, and `pretrain config show my.yaml` says where each value comes from.",
    ]
    for section, prop in schema["properties"].items():
        lines += ["", f"## {section}", "", *_section(resolve(prop, schema), f"{section}.", schema)]
    return "\n".join(lines) + "\n"


def _section(section: Schema, prefix: str, schema: Schema) -> Iterator[str]:
    """Yield the lines of one section: its sentence, its settings, then its subsections."""
    resume, defaults = settings.on_resume(), settings.flatten(settings.RunConfig())
    yield from (paragraph(section.get("description", "")), "")
    nested: list[tuple[str, Schema]] = []
    for name, prop in section["properties"].items():
        key, target = f"{prefix}{name}", resolve(prop, schema)
        if "properties" in target:
            nested.append((key, target))
            continue
        default = prop.get("default")
        if default != "auto":  # RunConfig() has resolved some of those already
            default = defaults.get(key, default)
        required = name in section.get("required", ())
        facts = [type_text(prop, schema), "required" if required else f"default `{json.dumps(default)}`"]
        facts += [RESUME_NOTES[resume[key]]] if key in resume else []
        yield from (f"#### `{key}` {{ #{key} }}", "", " · ".join(facts), "", paragraph(prop.get("description", "")), "")
        items = resolve(prop.get("items", {}), schema)
        choices = [resolve(choice, schema) for choice in prop.get("anyOf", ())]
        nested += [(f"{key}.N", items)] if "properties" in items else []
        nested += [(key, choice) for choice in choices if "properties" in choice]
    for key, target in nested:
        yield from ("", f"### {key} {{ #{key} }}", "", *_section(target, f"{key}.", schema))


def resolve(schema: Schema, root: Schema) -> Schema:
    """Follow a `$ref`; a property's own description wins over that of the class."""
    if "$ref" not in schema:
        return schema
    found: Schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    return {**found, **{key: value for key, value in schema.items() if key != "$ref"}}


def type_text(schema: Schema, root: Schema) -> str:
    """Return the values that a setting takes in words: `cosine` or `wsd`, integer > 0, list of strings."""
    schema = resolve(schema, root)
    if "anyOf" in schema:
        return " or ".join(type_text(choice, root) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "object")
    if kind == "null":
        return "`null`"
    if kind == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        return f"list of {type_text(items, root)}" if "properties" not in resolve(items, root) else "list of sections"
    if kind == "object":
        return "section" if "properties" in schema else "mapping"
    kind = "path" if schema.get("format") == "path" else kind
    return " ".join([kind, *(f"{sign} {schema[bound]:g}" for bound, sign in BOUNDS.items() if bound in schema)])


def paragraph(text: str) -> str:
    """Return the text as Markdown shows it verbatim: `|`, `<` and `*` outside of code are escaped."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else re.sub(r"([<>*_|\[\]])", r"\\\1", part) for part in parts)
