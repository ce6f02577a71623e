"""Decontamination: which training documents hold parts of evaluation texts.

A document is hit if it has `ngram` words in a row that an evaluation text has as well, words as `hashing.py` tells them: neither case
nor punctuation nor line breaks hide anything (T. Brown et al., "Language models are few-shot learners", arXiv:2005.14165, appendix C).
An evaluation text of fewer words counts as a whole if it has at least MIN_WORDS; shorter ones would hit by accident, and are counted.
Compared are 64-bit hashes: with 10^6 of them, one in 2*10^13 innocent n-grams is taken for one of theirs.
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
from data_pipeline.text.files import SourceFile, file_name, is_hidden, is_library_error, summarize_paths
from data_pipeline.text.sources import decode_bytes, decode_file, detect_other_format, make_document, read_lines
from data_pipeline.text.walk import BROKEN_LINK, find_glob, walk

MIN_WORDS = 8
"""An evaluation text of fewer words takes no part."""

SETTING = "data.decontaminate.paths"
EVALUATION_EXTENSIONS = (".txt", ".jsonl", ".parquet")
"""Of evaluation texts; those of text and jsonl may be followed by .gz or .zst."""

_PACKED = (".gz", ".zst")
TEXTS_PER_BATCH = 4096
"""Evaluation texts hashed together."""


@dataclass(frozen=True, eq=False)
class EvaluationNgrams:
    """What the evaluation texts hold."""

    hashes: NDArray[np.uint64]
    """Hashes of their n-grams, sorted, each once."""

    lengths: tuple[int, ...]
    """Words of these n-grams: `ngram`, and the lengths of shorter texts."""

    n_texts: int
    """Evaluation texts that take part."""

    n_too_short: int
    """Evaluation texts with words, but too few."""

    skipped_files: str | None = None
    """Files in the folders given that are no evaluation texts by their endings, in words."""

    @staticmethod
    def load(config: DecontaminateConfig) -> EvaluationNgrams | None:
        """Read the evaluation texts; None if there are no paths.

        Raises:
            DataError: a path does not exist, matches no file or cannot be read, or there is no text that is long enough.
        """
        if not config.paths:
            return None
        with redacting_errors(config.paths):
            return EvaluationNgrams._read(config)

    @staticmethod
    def _read(config: DecontaminateConfig) -> EvaluationNgrams:
        least = min(MIN_WORDS, config.ngram)
        found: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        lengths: set[int] = set()
        n_texts = n_too_short = 0
        found_files = [_find(given) for given in config.paths]
        evaluation = _texts([file for files, _ in found_files for file in files])
        others = [path for _, paths in found_files for path in paths]
        while texts := list(islice(evaluation, TEXTS_PER_BATCH)):
            n_words = np.zeros(len(texts), np.int64)
            for first, words, counts in word_batches(texts, config.ngram - 1):
                n_words[first : first + len(counts)] = counts
                hashes, grams = hash_ngrams(words, counts, config.ngram)
                found.append(np.unique(hashes[np.repeat(counts >= least, grams)]))
            lengths.update(np.unique(n_words[n_words >= least].clip(max=config.ngram)).tolist())
            n_texts += int((n_words >= least).sum())
            n_too_short += int(((n_words > 0) & (n_words < least)).sum())
        if not n_texts:
            raise DataError(
                f"{SETTING}: none of the texts in {', '.join(config.paths)} has {least} words ({n_too_short} have fewer)"
            )
        return EvaluationNgrams(
            np.unique(np.concatenate(found)),
            tuple(sorted(lengths)),
            n_texts,
            n_too_short,
            summarize_paths(others) if others else None,
        )

    @property
    def n_ngrams(self) -> int:
        """Different n-grams that are looked for."""
        return len(self.hashes)

    def find_contaminated(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of these texts share an n-gram with an evaluation text, [texts]."""
        hit = np.zeros(len(texts), np.bool_)
        for first, words, counts in word_batches(texts, self.lengths[-1] - 1):
            for length in self.lengths:
                hashes, grams = hash_ngrams(words, counts, length)
                hit[first + np.searchsorted(grams.cumsum(), self._found(hashes), "right")] = True
        return hit

    def _found(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Which of these hashes are among the evaluation texts'."""
        maybe = np.flatnonzero(self._sieve[hashes >> np.uint64(64 - self._bits)])
        places = np.searchsorted(self.hashes, hashes[maybe]).clip(max=len(self.hashes) - 1)
        found: NDArray[np.int64] = maybe[self.hashes[places] == hashes[maybe]]
        return found

    @cached_property
    def _bits(self) -> int:
        """Leading bits by which the sieve goes: about one in 16 of its places is taken, up to 64 MB."""
        return min(26, len(self.hashes).bit_length() + 4)

    @cached_property
    def _sieve(self) -> NDArray[np.bool_]:
        """Whether some n-gram begins with these bits: spares almost all others the search among all."""
        sieve = np.zeros(1 << self._bits, np.bool_)
        sieve[self.hashes >> np.uint64(64 - self._bits)] = True
        return sieve


def evaluation_hash(config: DecontaminateConfig) -> str:
    """A hash of all n-grams that are looked for; empty if there are no paths. Raises what `EvaluationNgrams.load` raises."""
    contamination = EvaluationNgrams.load(config)
    return xxhash.xxh3_128_hexdigest(contamination.hashes.tobytes()) if contamination else ""


def _texts(files: Sequence[SourceFile]) -> Iterator[str]:
    """All evaluation texts: whole text files, every string in the lines of .jsonl and in the rows of .parquet, however deep inside."""
    for file in files:
        read = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[_ending(file.path)]
        try:
            with file.fs.open(file.path, "rb") as stream:
                yield from read(stream, file)
        except DataError as error:
            raise DataError(f"{SETTING}: {error}") from error
        except Exception as error:  # broken JSON and parquet, and whatever a driver raises
            if not (isinstance(error, OSError | EOFError | ValueError) or is_library_error(error)):
                raise
            other = detect_other_format(file, _ending(file.path)[1:])
            advice = f"; it is {other.name}{'' if other.kind else f': {other.remedy}'}" if other else ""
            raise DataError(f"{SETTING}: cannot read {file.path}: {one_line(error)}{advice}") from error


def _find(given: str) -> tuple[list[SourceFile], list[str]]:
    """(the files that one entry of `paths` stands for, sorted; the paths of the visible files beside them)."""
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
    except Exception as error:  # no permission or connection, unknown protocol, missing driver
        if not (isinstance(error, OSError | ValueError | ImportError) or is_library_error(error)):
            raise
        raise DataError(f"{SETTING}: cannot read {given}: {error}") from error
    for file, info in found.items():
        if (
            info["type"] == BROKEN_LINK
            and _ending(file) in EVALUATION_EXTENSIONS
            and not is_hidden(file.rsplit("/", 1)[-1])
        ):
            raise DataError(f"{SETTING}: {file} is a link that leads nowhere; restore what it points to, or remove it")
    files = [
        file
        for file, info in sorted(found.items())
        if info["type"] == "file" and _ending(file) in EVALUATION_EXTENSIONS
    ]
    if not files:
        what = (
            f"holds no file that ends with {', '.join(EVALUATION_EXTENSIONS)}"
            if found
            else "does not exist or matches no file"
        )
        raise DataError(f"{SETTING}: {given} {what}")
    read = set(files)
    others = sorted(file for file in found if file not in read and not is_hidden(file.rsplit("/", 1)[-1]))
    return [SourceFile(fs, file, file.rsplit("/", 1)[-1], 0, "") for file in files], others


def _ending(file: str) -> str:
    """Of a text or jsonl file the one in front of .gz and .zst."""
    path = PurePosixPath(file_name(file))
    inside = PurePosixPath(path.stem).suffix
    return inside if path.suffix in _PACKED and inside != ".parquet" else path.suffix


def _read_txt(stream: BinaryIO, file: SourceFile) -> Iterator[str]:
    text, lost = decode_file(stream.read(), file)
    if make_document(file.name, text, "", {}, lost, 0).defect:
        raise ValueError("it is not UTF-8, so nothing would be found by it; convert it (iconv -f LATIN1 -t UTF-8)")
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
        for column in batch.columns:  # by themselves, because two may have one name
            for value in column.to_pylist():
                yield from _strings(value)


def _strings(value: object) -> Iterator[str]:
    """Every string among the values of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inside in value.values():
            yield from _strings(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _strings(inside)
