"""Decontamination: find training documents that contain parts of evaluation texts.

A document is contaminated if it shares a run of `ngram` words with an evaluation text. Words are those of `hashing.py`,
so case, punctuation and line breaks hide nothing (T. Brown et al., "Language models are few-shot learners",
arXiv:2005.14165, appendix C). An evaluation text of fewer than `ngram` words is compared as a whole if it has at least
MIN_WORDS. Shorter ones would match by accident: they are left out and counted. The comparison uses 64-bit hashes: with
10^6 evaluation n-grams, one in 2*10^13 other n-grams matches by accident.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import BinaryIO

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.addresses import expand_variables, redacting_errors
from data_pipeline.errors import DataError, one_line
from data_pipeline.hashing import hash_ngrams, word_batches
from data_pipeline.settings import DecontaminateConfig
from data_pipeline.text.blocks import read_lines
from data_pipeline.text.files import SourceFile, file_name, is_hidden, is_library_error, summarize_paths
from data_pipeline.text.sources import decode_bytes, decode_file, detect_other_format, make_document
from data_pipeline.text.walk import BROKEN_LINK, find_glob, walk

MIN_WORDS = 8
"""Evaluation texts of fewer words are left out."""

SETTING = "data.decontaminate.paths"
EVALUATION_EXTENSIONS = (".txt", ".jsonl", ".parquet")
"""Extensions of evaluation files. `.gz` or `.zst` may follow `.txt` and `.jsonl`."""

_COMPRESSED = (".gz", ".zst")
TEXTS_PER_BATCH = 4096
"""Evaluation texts hashed at a time."""


@dataclass(frozen=True, eq=False)
class EvaluationNgrams:
    """The n-grams of all evaluation texts, as sorted hashes."""

    hashes: NDArray[np.uint64]
    """Distinct n-gram hashes, sorted."""

    lengths: tuple[int, ...]
    """The n of these n-grams: `ngram`, and the lengths of shorter texts that are compared as a whole. Ascending."""

    n_texts: int
    """Evaluation texts that are compared."""

    n_too_short: int
    """Evaluation texts left out because they have too few words; texts without any are not counted."""

    skipped_files: str | None = None
    """A summary of the files that were not read because of their extension; None where there are none."""

    @staticmethod
    def load(config: DecontaminateConfig) -> EvaluationNgrams | None:
        """Read the evaluation texts. Returns None if the config has no paths.

        Raises:
            DataError: a path does not exist, matches no file or cannot be read, or no text is long enough.
        """
        if not config.paths:
            return None
        with redacting_errors(config.paths):
            return EvaluationNgrams._read(config)

    @staticmethod
    def _read(config: DecontaminateConfig) -> EvaluationNgrams:
        min_words = min(MIN_WORDS, config.ngram)
        hashes_of_batches: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        lengths: set[int] = set()
        n_texts = n_too_short = 0
        listed = [_list_files(given) for given in config.paths]
        evaluation_texts = _read_texts([file for files, _ in listed for file in files])
        skipped = [path for _, paths in listed for path in paths]
        while texts := list(islice(evaluation_texts, TEXTS_PER_BATCH)):
            n_words = np.zeros(len(texts), np.int64)
            for first, words, counts in word_batches(texts, config.ngram - 1):
                n_words[first : first + len(counts)] = counts
                hashes, n_grams = hash_ngrams(words, counts, config.ngram)
                hashes_of_batches.append(np.unique(hashes[np.repeat(counts >= min_words, n_grams)]))
            lengths.update(np.unique(n_words[n_words >= min_words].clip(max=config.ngram)).tolist())
            n_texts += int((n_words >= min_words).sum())
            n_too_short += int(((n_words > 0) & (n_words < min_words)).sum())
        if not n_texts:
            raise DataError(
                f"{SETTING}: none of the texts in {', '.join(config.paths)} has {min_words} words "
                f"({n_too_short} have fewer)"
            )
        return EvaluationNgrams(
            np.unique(np.concatenate(hashes_of_batches)),
            tuple(sorted(lengths)),
            n_texts,
            n_too_short,
            summarize_paths(skipped) if skipped else None,
        )

    @property
    def n_ngrams(self) -> int:
        """The number of distinct n-grams."""
        return len(self.hashes)

    def find_contaminated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return which of these texts share an n-gram with an evaluation text, [texts]."""
        is_contaminated = np.zeros(len(texts), np.bool_)
        for first, words, counts in word_batches(texts, self.lengths[-1] - 1):
            for length in self.lengths:
                hashes, n_grams = hash_ngrams(words, counts, length)
                texts_of_matches = np.searchsorted(n_grams.cumsum(), self._find_matches(hashes), "right")
                is_contaminated[first + texts_of_matches] = True
        return is_contaminated

    def _find_matches(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the indices of the hashes that are evaluation n-grams."""
        candidates = np.flatnonzero(self._prefix_table[hashes >> np.uint64(64 - self._prefix_bits)])
        nearest = np.searchsorted(self.hashes, hashes[candidates]).clip(max=len(self.hashes) - 1)
        matches: NDArray[np.int64] = candidates[self.hashes[nearest] == hashes[candidates]]
        return matches

    @cached_property
    def _prefix_bits(self) -> int:
        """Leading bits of a hash that index `_prefix_table`: so many that about 1 in 16 entries is set, up to 64 MB."""
        return min(26, len(self.hashes).bit_length() + 4)

    @cached_property
    def _prefix_table(self) -> NDArray[np.bool_]:
        """Whether some evaluation n-gram has this prefix. Spares nearly all other n-grams the binary search."""
        table = np.zeros(1 << self._prefix_bits, np.bool_)
        table[self.hashes >> np.uint64(64 - self._prefix_bits)] = True
        return table


def evaluation_hash(config: DecontaminateConfig) -> str:
    """Return a hash of all evaluation n-grams, or an empty string if there are no paths.

    Raises what `EvaluationNgrams.load` raises.
    """
    ngrams = EvaluationNgrams.load(config)
    return xxhash.xxh3_128_hexdigest(ngrams.hashes.tobytes()) if ngrams else ""


def _read_texts(files: Sequence[SourceFile]) -> Iterator[str]:
    """Yield all evaluation texts: each text file, and every string at any depth of .jsonl lines and .parquet rows."""
    for file in files:
        read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[_extension(file.path)]
        try:
            with file.fs.open(file.path, "rb") as stream:
                yield from read(stream, file)
        except DataError as error:
            raise DataError(f"{SETTING}: {error}") from error
        except Exception as error:  # broken JSON and parquet raise ValueError, drivers raise kinds of their own
            if not (isinstance(error, OSError | EOFError | ValueError) or is_library_error(error)):
                raise
            other = detect_other_format(file, _extension(file.path)[1:])
            advice = f"; it is {other.name}{'' if other.kind else f': {other.remedy}'}" if other else ""
            raise DataError(f"{SETTING}: cannot read {file.path}: {one_line(error)}{advice}") from error


def _list_files(given: str) -> tuple[list[SourceFile], list[str]]:
    """Return (the evaluation files of one entry of `paths`, sorted; the paths of its other visible files)."""
    try:
        fs, path = fsspec.core.url_to_fs(expand_variables(given, SETTING))
        if fs.isdir(path):
            found = walk(fs, path, ())
        elif any(sign in path for sign in "*?[") and not fs.exists(path):
            found = find_glob(fs, path, ())
        else:
            found = {path: fs.info(path)}
    except FileNotFoundError:
        raise DataError(f"{SETTING}: {given} does not exist or matches no file") from None
    except Exception as error:  # no permission, no connection, an unknown protocol, a missing driver
        if not (isinstance(error, OSError | ValueError | ImportError) or is_library_error(error)):
            raise
        raise DataError(f"{SETTING}: cannot read {given}: {error}") from error
    visible = {path: info for path, info in sorted(found.items()) if not is_hidden(path.rsplit("/", 1)[-1])}
    for path, info in visible.items():
        if info["type"] == BROKEN_LINK and _extension(path) in EVALUATION_EXTENSIONS:
            raise DataError(f"{SETTING}: {path} is a broken link; restore its target, or remove it")
    files = [
        path
        for path, info in sorted(found.items())
        if info["type"] == "file" and _extension(path) in EVALUATION_EXTENSIONS
    ]
    if not files:
        holds_none = f"holds no file that ends with {', '.join(EVALUATION_EXTENSIONS)}"
        raise DataError(f"{SETTING}: {given} {holds_none if found else 'does not exist or matches no file'}")
    to_read = set(files)
    others = [path for path in visible if path not in to_read]
    return [SourceFile(fs, path, path.rsplit("/", 1)[-1], 0, "") for path in files], others


def _extension(file: str) -> str:
    """Return the extension of a file; of a compressed text or jsonl file, the one before `.gz` or `.zst`."""
    path = PurePosixPath(file_name(file))
    inner = PurePosixPath(path.stem).suffix
    return inner if path.suffix in _COMPRESSED and inner != ".parquet" else path.suffix


def _read_txt(stream: BinaryIO, file: SourceFile) -> Iterator[str]:
    text, lost = decode_file(stream.read(), file)
    if make_document(file.name, text, "", {}, lost, 0).defect:
        raise ValueError("it is not UTF-8, so it would match nothing; convert it (iconv -f LATIN1 -t UTF-8)")
    yield text


def _read_jsonl(stream: BinaryIO, file: SourceFile) -> Iterator[str]:
    for number, (_, line, _) in enumerate(read_lines(stream, file.file_name, 0, None), start=1):
        line = line.removeprefix(BOM_UTF8)
        if line.strip():
            try:
                yield from _strings(json.loads(decode_bytes(line)[0]))
            except json.JSONDecodeError as error:
                raise ValueError(f"broken JSON in line {number} ({error.msg} at column {error.colno})") from None
            except RecursionError as error:
                raise ValueError(f"broken JSON in line {number} ({error})") from None


def _read_parquet(stream: BinaryIO, file: SourceFile) -> Iterator[str]:
    import pyarrow.parquet

    del file
    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches():
        for column in batch.columns:  # column by column, because two columns may have the same name
            for value in column.to_pylist():
                yield from _strings(value)


def _strings(value: object) -> Iterator[str]:
    """Yield every string inside a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
