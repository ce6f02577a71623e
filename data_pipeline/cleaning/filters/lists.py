"""Filters that use the user's lists: of domains, and of lines.

A list is held as the sorted 64-bit hashes of its entries, 8 bytes an entry, so that every worker can hold millions of
entries. A text that is not on a list of n entries matches it by accident with probability n / 2^64.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.cleaning.filters.result import DocumentFilter, FilterResult
from data_pipeline.errors import DataError
from data_pipeline.settings_filters import LineFilter, UrlFilter
from data_pipeline.text.formats import HEAD_BYTES, detect_binary_format, detect_encoding
from data_pipeline.text.sources import Document

_HOST = re.compile(r"\s*(?:(?:[a-z][a-z0-9+.-]*:)?//)?(?:[^/?#@]*@)?([^/?#:]*)", re.IGNORECASE)
"""Finds the host of an address, with or without a scheme. It also finds some host in a text that is no address; no list
has it."""

_MAX_HOST_CHARACTERS = 253
"""RFC 1035. What is longer is no host; only its end is looked up."""

_PLAIN_DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")


def url_filter(settings: UrlFilter) -> DocumentFilter:
    """Build the `url` filter. Its reasons: `listed domain`, `listed word`. A document without an address is kept."""
    if not settings.domains and not settings.words:
        raise DataError("data.filters.url has neither domains nor words; set one, or take url out of the filters")
    listed = _read_list(settings.domains, "url.domains", _normalize_domain) if settings.domains else None
    words = "|".join(map(re.escape, settings.words))
    pattern = re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])", re.IGNORECASE) if words else None

    def apply(document: Document) -> FilterResult:
        value = document.metadata.get(settings.field)
        address = "" if value is None else str(value)
        if address and listed is not None and _on_list(listed, _parent_domains(address)).any():
            return FilterResult(document.text, "listed domain")
        if address and pattern is not None and pattern.search(unquote(address)):
            return FilterResult(document.text, "listed word")
        return FilterResult(document.text)

    return apply


def line_filter(settings: LineFilter) -> DocumentFilter:
    """Build the `lines` filter. Its reason: `listed lines`. Empty lines are ignored."""
    if not settings.files:
        raise DataError("data.filters.lines.files names no file of lines; set it, or take lines out of the filters")
    listed = _read_list(settings.files, "lines.files", str.strip)

    def apply(document: Document) -> FilterResult:
        lines = [line for line in map(str.strip, document.text.split("\n")) if line]
        n_listed = int(_on_list(listed, lines).sum())
        return FilterResult(document.text, "listed lines" if n_listed > settings.max_fraction * len(lines) else None)

    return apply


@contextmanager
def explain_list_errors(file: Path, setting: str) -> Iterator[None]:
    """Turn an OSError on a list file into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.filters.{setting}: cannot read {file} ({error.strerror}); correct the path or remove it"
        ) from error


def _read_list(files: Sequence[Path], setting: str, normalize: Callable[[str], str]) -> NDArray[np.uint64]:
    """Return the sorted hashes of the entries of the files: one entry a line, empty lines ignored."""
    hashes: list[NDArray[np.uint64]] = []
    for file in files:
        _check_is_text(file, setting)
        # Bytes that are not UTF-8 become U+FFFD, as they do in the documents.
        with (
            explain_list_errors(file, setting),
            file.open(encoding="utf-8-sig", errors="replace", newline="\n") as stream,
        ):
            entries = (normalize(line) for line in stream)
            hashes.append(np.fromiter((_hash(entry) for entry in entries if entry), np.uint64))
        if not len(hashes[-1]):
            raise DataError(f"data.filters.{setting}: {file} is empty; take it out")
    listed = np.concatenate(hashes)
    listed.sort()
    return listed


def _check_is_text(file: Path, setting: str) -> None:
    """Raise DataError if the first bytes are not UTF-8 text: no document would match such a list."""
    with explain_list_errors(file, setting), file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    found = detect_binary_format(head)
    name = found.name if found else detect_encoding(head)[0].upper()
    if name != "UTF-8":
        raise DataError(f"data.filters.{setting}: {file} is {name}; a list is plain UTF-8 text, an entry a line")


def _on_list(listed: NDArray[np.uint64], entries: Sequence[str]) -> NDArray[np.bool_]:
    """Return whether each entry is on the list."""
    hashes = np.fromiter(map(_hash, entries), np.uint64, len(entries))
    nearest = np.minimum(np.searchsorted(listed, hashes), len(listed) - 1)
    found: NDArray[np.bool_] = listed[nearest] == hashes
    return found


def _hash(entry: str) -> int:
    return xxhash.xxh3_64_intdigest(entry.encode("utf-8", "surrogatepass"))


def _normalize_domain(line: str) -> str:
    """Normalize a line of a domain list; the result is empty for a comment.

    ` Example.COM. ` -> `example.com`; `*.example.com` -> `example.com`; `bücher.de` -> `xn--bcher-kva.de`.
    """
    line = line.strip()
    if _PLAIN_DOMAIN.fullmatch(line):  # the common case, made fast: lists have millions of lines
        return line
    name = line.partition("#")[0].strip().removeprefix("*")
    if re.search(r"[\s/]", name):
        raise DataError(f"data.filters.url.domains: {line!r} is not a domain; give one a line, such as example.com")
    return _canonical_host(name)


def _parent_domains(address: str) -> list[str]:
    """Return the host of an address and all domains that contain it: `a.b.org`, `b.org`, `org`."""
    match = _HOST.match(address)
    labels = _canonical_host(match[1].strip()[-_MAX_HOST_CHARACTERS:] if match else "").split(".")
    return [".".join(labels[i:]) for i in range(len(labels))]


def _canonical_host(host: str) -> str:
    """Return the canonical spelling of a host: lower case, with letters other than a to z encoded (RFC 3490)."""
    host = host.strip(".").lower()
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:  # not a valid host
        return host
