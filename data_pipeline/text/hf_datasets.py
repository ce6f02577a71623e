"""Data sets of Hugging Face: their rows as documents. `datasets` is imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.addresses import expand_variables
from data_pipeline.errors import DataError, one_line
from data_pipeline.text.files import dataset_names
from data_pipeline.text.sources import Document, columns_to_read, explain_read_errors, extract_fields, make_document

if TYPE_CHECKING:
    import datasets

    from data_pipeline.settings import SourceConfig


def read_hf_dataset(name: str, source: SourceConfig, origin: str) -> Iterator[Document]:
    """Yield the documents of one split of a Hugging Face data set."""
    rows, number = _open_hf(name, source), 0
    first, *more = dataset_names(source.paths)
    prefix = dict(zip(source.paths, (first, *(f"{end}/" for end in more)), strict=True))[name]
    if rows.column_names is not None:  # a stream may not know its columns; then each row tells
        rows = rows.select_columns(columns_to_read(rows.column_names, name, source))

    def where() -> str:
        return f"{name}, row {number} of split {source.split}"

    with explain_read_errors(f"{name} (split {source.split})"):
        for number, row in enumerate(rows):
            identity, text, metadata = extract_fields(row, where, source)
            yield make_document(identity or f"{prefix}{source.split}:{number}", text, origin, metadata, 0, 0)


def _open_hf(name: str, source: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """One split of a Hugging Face data set: a name on the hub, a folder of files, or a folder that `save_to_disk` wrote."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it prints the errors that it raises
    path = expand_variables(name)
    what = f"data set {name} (subset={source.subset}, split={source.split})"
    try:
        if any((Path(path) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(path)
        else:
            saved = datasets.load_dataset(path, name=source.subset, split=source.split, streaming=source.streaming)
    except (
        Exception
    ) as error:  # only datasets' own code runs here; it raises TypeError and KeyError on folders it does not understand
        cause = error.__cause__ or error  # its own error may say no more than that there was one
        detail = one_line(cause)
        raise DataError(
            f"data.sources: cannot open {what}: {detail}; check `paths`, `subset`, `split` and the connection"
        ) from error
    if isinstance(saved, dict):
        if source.split not in saved:
            raise DataError(
                f"data.sources: cannot open {what}: it has the splits {', '.join(map(str, saved))}; set `split` to one of them"
            )
        return saved[source.split]
    return saved
