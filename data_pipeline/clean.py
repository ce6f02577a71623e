"""What is left of the raw text: every document gets a verdict, and one that is dropped gets its reason.

One pass over the chunks applies the filters and signs what they keep; the signatures of all chunks then tell the duplicates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.chunks import Chunk, read_batches
from data_pipeline.decontaminate import Contamination
from data_pipeline.dedup import find_duplicates, write_signatures
from data_pipeline.filters import EDITS, Judge, Verdict, build_judge
from data_pipeline.minhash import Signer, text_hash
from data_pipeline.settings import DecontaminateConfig, FilterConfig, FilterName, PrepareConfig, SourceConfig
from data_pipeline.sources import Document
from data_pipeline.verdicts import KEPT, Verdicts, read_verdicts, write_verdicts
from data_pipeline.workers import Done, Tell, run_jobs

CONTAMINATED = "shares text with evaluation sets"
EMPTY = "empty"


@dataclass(frozen=True)
class CleanJob:
    """A chunk, and all that decides what is kept of it."""

    chunk: Chunk
    source: SourceConfig
    config: PrepareConfig
    folder: Path
    key: str

    @property
    def name(self) -> str:
        """The chunk's name."""
        return self.chunk.name

    @property
    def verdicts(self) -> Path:
        """Where the verdicts go."""
        return self.folder / f"{self.name}.npz"

    @property
    def signatures(self) -> Path:
        """Where the signatures go."""
        return self.folder / f"{self.name}.signatures"


def needs_cleaning(config: PrepareConfig) -> bool:
    """Whether anything but emptiness can drop a document."""
    return bool(
        config.filters.apply
        or any(source.filters for source in config.sources)
        or config.dedup.exact
        or config.dedup.minhash
        or config.decontaminate.paths
    )


def clean(jobs: Sequence[CleanJob], config: PrepareConfig, workers: int, tell: Tell, comparing: Callable[[float], None]) -> dict[str, Path]:
    """Judge every chunk, then compare all that is kept.

    Args:
        jobs: the chunks in order; what an earlier attempt finished with the same key is not done again.
        config: what to drop.
        workers: processes.
        tell: is told what was read.
        comparing: is told the share of the comparison that is done.

    Returns:
        For each chunk's name the file of its verdicts.
    """
    missing = []
    for job in jobs:
        there = read_verdicts(job.verdicts, job.key)
        if there is None or (_signs(config) and not job.signatures.is_file()):
            missing.append(job)
        else:
            tell(Done(len(there.codes), job.chunk.bytes or 0))
    for _ in run_jobs(judge_chunk, missing, workers, tell):
        pass
    if not _signs(config):
        return {job.name: job.verdicts for job in jobs}
    found = find_duplicates([job.signatures for job in jobs], [job.chunk.source for job in jobs], config.dedup, comparing)
    files: dict[str, Path] = {}
    for job, codes in zip(jobs, found.codes, strict=True):
        judged = read_verdicts(job.verdicts, job.key)
        assert judged is not None
        files[job.name] = job.folder / f"{job.name}.compared.npz"
        write_verdicts(files[job.name], judged.with_reasons([found.reasons[code] for code in codes.tolist()]))
    return files


def judge_chunk(job: CleanJob, tell: Tell) -> None:
    """Read a chunk, apply the filters, sign what they keep; write both files."""
    config = job.config
    judge = _judge(config.filters, filters_of(job.source, config))
    contamination = _contamination(config.decontaminate)
    signer = Signer(config.dedup.ngram, config.dedup.bands, config.dedup.rows) if config.dedup.minhash else None
    reasons: list[str | None] = []
    marks, hashes, bands, read = [], [], [], 0
    for batch in read_batches(job.chunk, job.source):
        judged = [judge(document) if document.text.strip() else Verdict(document.text, EMPTY) for document in batch]
        verdicts, texts = [verdict.reason for verdict in judged], [verdict.text for verdict in judged]
        hits = contamination.hits(texts) if contamination else np.zeros(len(batch), np.bool_)
        if config.decontaminate.action == "drop":
            verdicts = [verdict or (CONTAMINATED if hit else None) for verdict, hit in zip(verdicts, hits.tolist(), strict=True)]
        reasons += verdicts
        marks.append(hits & (config.decontaminate.action == "mark"))
        hashes.append(np.array([text_hash(text) if config.dedup.exact else 0 for text in texts], np.uint64))
        bands.append(signer.sign(texts) if signer else np.zeros((len(batch), 0), np.uint64))
        tell(Done(len(batch), batch[-1].read - read))
        read = batch[-1].read
    verdict = Verdicts.of(reasons, np.concatenate([np.zeros(0, np.bool_), *marks]), job.key)
    if _signs(config):
        n_bands = config.dedup.bands if signer else 0
        write_signatures(
            job.signatures,
            np.concatenate([np.zeros(0, np.uint64), *hashes]),
            np.concatenate([np.zeros((0, n_bands), np.uint64), *bands]),
            verdict.codes == KEPT,
        )
    write_verdicts(job.verdicts, verdict)


def filters_of(source: SourceConfig, config: PrepareConfig) -> tuple[FilterName, ...]:
    """The filters that judge a source."""
    return config.filters.apply if source.filters is None else source.filters


def edited(document: Document, source: SourceConfig, config: PrepareConfig) -> tuple[Document, tuple[str, ...]]:
    """A kept document as the filters that change texts leave it, and what they changed."""
    names = tuple(name for name in filters_of(source, config) if name in EDITS)
    if not names:
        return document, ()
    verdict = _judge(config.filters, names)(document)
    return replace(document, text=verdict.text, n_bytes=len(verdict.text.encode())), verdict.repairs


def _signs(config: PrepareConfig) -> bool:
    return config.dedup.exact or config.dedup.minhash


@functools.lru_cache(maxsize=16)
def _judge(config: FilterConfig, names: tuple[FilterName, ...]) -> Judge:
    """Built once a process: word lists and language models take their time."""
    return build_judge(config, names)


@functools.lru_cache(maxsize=1)
def _contamination(config: DecontaminateConfig) -> Contamination | None:
    """Read once a process."""
    return Contamination.load(config)
