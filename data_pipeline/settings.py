"""Settings of the data pipeline: pydantic only, so that reading a config stays fast."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class SourceConfig(BaseModel):
    """One source of raw text. Its documents are numbered in the sorted order of its files."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Literal["text", "jsonl", "parquet", "hf"]
    """`text`: a file is a document. `jsonl`: a line is one (plain, .gz, .zst). `parquet`: a row is one. `hf`: a Hugging Face data set."""

    paths: tuple[str, ...] = ()
    """Files, folders or globs, local or any fsspec address; read in the order given, the files of each sorted by name. A folder
    means all files below it of this kind. For `hf`: the data set's name or folder."""

    pattern: str | None = None
    """Which files of a folder to take, as a glob such as `*.py`; none takes `*.txt` and `*.md`, `*.jsonl[.gz|.zst]` or `*.parquet`."""

    exclude: tuple[str, ...] = ()
    """Files and folders to leave out, as globs of a name or of the path below the folder: `site-packages`, `test_*.py`, `docs/old/*`."""

    text_field: str = "text"
    """Column or JSON key that holds the text."""

    id_field: str | None = None
    """Column or JSON key that names a document; none, or a null in the data, numbers by file and position."""

    split: str = "train"
    """`hf`: which split."""

    subset: str | None = None
    """`hf`: configuration of the data set."""

    streaming: bool = True
    """`hf`: read while downloading instead of downloading first."""
