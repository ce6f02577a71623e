"""Filters that look things up in lists of the user: domains of addresses, and lines.

A list is kept as the sorted 64-bit hashes of its entries: 8 bytes an entry, so that every worker can hold one of millions. The chance
that a text which is not on a list of n entries is taken for one that is, is n / 2^64.
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
from data_pipeline.settings import LineFilter, UrlFilter
from data_pipeline.text.formats import HEAD_BYTES, detect_binary_format, detect_encoding
from data_pipeline.text.sources import Document

_HOST = re.compile(r"\s*(?:(?:[a-z][a-z0-9+.-]*:)?//)?(?:[^/?#@]*@)?([^/?#:]*)", re.IGNORECASE)
"""The host of an address, with or without a scheme in front. Whatever is not an address has a host as well, on no list."""

_LONGEST_HOST = 253
"""Characters (RFC 1035); what is longer is none, and only its end is looked up."""

_PLAIN_DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")


def url_filter(settings: UrlFilter) -> DocumentFilter:
    """Reasons: `listed domain`, `listed word`. A document without an address is kept."""
    if not settings.domains and not settings.words:
        raise DataError("data.filters.url has neither domains nor words; set one, or take url out of the filters")
    listed = _read_list(settings.domains, "url.domains", _domain) if settings.domains else None
    words = "|".join(map(re.escape, settings.words))
    pattern = re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])", re.IGNORECASE) if words else None

    def judge(document: Document) -> FilterResult:
        value = document.metadata.get(settings.field)
        address = "" if value is None else str(value)
        if address and listed is not None and _on_list(listed, _domains(address)).any():
            return FilterResult(document.text, "listed domain")
        if address and pattern is not None and pattern.search(unquote(address)):
            return FilterResult(document.text, "listed word")
        return FilterResult(document.text)

    return judge


def line_filter(settings: LineFilter) -> DocumentFilter:
    """Reason: `listed lines`. Empty lines do not count, neither as lines nor as listed."""
    if not settings.files:
        raise DataError("data.filters.lines.files names no file of lines; set it, or take lines out of the filters")
    listed = _read_list(settings.files, "lines.files", str.strip)

    def judge(document: Document) -> FilterResult:
        lines = [line for line in map(str.strip, document.text.split("\n")) if line]
        n_listed = int(_on_list(listed, lines).sum())
        return FilterResult(document.text, "listed lines" if n_listed > settings.max_fraction * len(lines) else None)

    return judge


@contextmanager
def explain_list_errors(file: Path, setting: str) -> Iterator[None]:
    """Turn a list file that cannot be read into one line that names it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.filters.{setting}: cannot read {file} ({error.strerror}); mend the path or take it out"
        ) from error


def _read_list(files: Sequence[Path], setting: str, normal: Callable[[str], str]) -> NDArray[np.uint64]:
    """Sorted hashes of the entries of the files, one a line; empty lines do not count."""
    hashes: list[NDArray[np.uint64]] = []
    for file in files:
        _check_is_text(file, setting)
        # What is not UTF-8 becomes U+FFFD, as it does in the documents.
        with (
            explain_list_errors(file, setting),
            file.open(encoding="utf-8-sig", errors="replace", newline="\n") as stream,
        ):
            entries = (normal(line) for line in stream)
            hashes.append(np.fromiter((_hash(entry) for entry in entries if entry), np.uint64))
        if not len(hashes[-1]):
            raise DataError(f"data.filters.{setting}: {file} is empty; take it out")
    listed = np.concatenate(hashes)
    listed.sort()
    return listed


def _check_is_text(file: Path, setting: str) -> None:
    """DataError if the first bytes are not UTF-8 text: taken for it, the list would hold nothing that any document has."""
    with explain_list_errors(file, setting), file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    found = detect_binary_format(head)
    name = found.name if found else detect_encoding(head)[0].upper()
    if name != "UTF-8":
        raise DataError(f"data.filters.{setting}: {file} is {name}; a list is plain UTF-8 text, an entry a line")


def _on_list(listed: NDArray[np.uint64], entries: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each entry is on the list."""
    hashes = np.fromiter(map(_hash, entries), np.uint64, len(entries))
    places = np.minimum(np.searchsorted(listed, hashes), len(listed) - 1)
    found: NDArray[np.bool_] = listed[places] == hashes
    return found


def _hash(entry: str) -> int:
    return xxhash.xxh3_64_intdigest(entry.encode("utf-8", "surrogatepass"))


def _domain(line: str) -> str:
    """`# a comment` -> ``; ` Example.COM. ` -> `example.com`; `*.example.com` -> `example.com`; `bücher.de` -> `xn--bcher-kva.de`."""
    line = line.strip()
    if _PLAIN_DOMAIN.fullmatch(line):  # quick: lists have millions
        return line
    name = line.partition("#")[0].strip().removeprefix("*")
    if re.search(r"[\s/]", name):
        raise DataError(f"data.filters.url.domains: {line!r} is not a domain; give one a line, such as example.com")
    return _ascii(name)


def _domains(address: str) -> list[str]:
    """The host of an address and all domains that it is in: `a.b.org`, `b.org`, `org`."""
    match = _HOST.match(address)
    labels = _ascii(match[1].strip()[-_LONGEST_HOST:] if match else "").split(".")
    return [".".join(labels[i:]) for i in range(len(labels))]


def _ascii(host: str) -> str:
    """A host's one spelling: in lower case, with other letters than a to z encoded (RFC 3490)."""
    host = host.strip(".").lower()
    try:
        return host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:  # no real host
        return host
