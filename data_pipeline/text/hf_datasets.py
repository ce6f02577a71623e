"""Read Hugging Face datasets: each row is a document. `datasets` is imported only where it is used."""

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


def read_hf_dataset(name: str, source: SourceConfig, source_name: str) -> Iterator[Document]:
    """Yield the documents of one split of a Hugging Face dataset."""
    rows, number = _open_split(name, source), 0
    first, *more = dataset_names(source.paths)
    prefix = dict(zip(source.paths, (first, *(f"{other}/" for other in more)), strict=True))[name]
    if rows.column_names is not None:  # a stream may not know its columns: then `extract_fields` checks each row
        rows = rows.select_columns(columns_to_read(rows.column_names, name, source))

    def where() -> str:
        return f"{name}, row {number} of split {source.split}"

    with explain_read_errors(f"{name} (split {source.split})"):
        for number, row in enumerate(rows):
            identity, text, metadata = extract_fields(row, where, source)
            yield make_document(identity or f"{prefix}{source.split}:{number}", text, source_name, metadata, 0, 0)


def _open_split(name: str, source: SourceConfig) -> datasets.Dataset | datasets.IterableDataset:
    """Open a split of a dataset: a name on the hub, a folder of files, or a folder that `save_to_disk` wrote."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also prints the errors that it raises
    path = expand_variables(name)
    what = f"dataset {name} (subset={source.subset}, split={source.split})"
    try:
        if any((Path(path) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(path)
        else:
            saved = datasets.load_dataset(path, name=source.subset, split=source.split, streaming=source.streaming)
    # Only code of `datasets` runs here, and it raises TypeError and KeyError on folders that it does not understand.
    except Exception as error:
        cause = error.__cause__ or error  # the outer error may say nothing
        detail = one_line(cause)
        raise DataError(
            f"data.sources: cannot open {what}: {detail}; check `paths`, `subset`, `split` and the connection"
        ) from error
    if isinstance(saved, dict):
        if source.split not in saved:
            raise DataError(
                f"data.sources: cannot open {what}: it has the splits {', '.join(map(str, saved))}; "
                f"set `split` to one of them"
            )
        return saved[source.split]
    return saved
