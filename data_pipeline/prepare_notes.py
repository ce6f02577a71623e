"""What a preparation tells its user: notes on what it did, and errors if a split would be empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from data_pipeline.cleaning.decontaminate import EVALUATION_EXTENSIONS, EvaluationNgrams
from data_pipeline.cleaning.minhash import similarity_threshold
from data_pipeline.corpus import Corpus
from data_pipeline.errors import DataError
from data_pipeline.splitting import count_documents, notes_on_held_out, sum_by_reason
from data_pipeline.text.files import file_patterns
from data_pipeline.text.sources import DEFECTS, MAX_UNDECODED
from data_pipeline.tokenizing.tokenize import ChunkResult

CONVERT_TO_UTF8 = "convert it to UTF-8 if it is text (iconv -f LATIN1 -t UTF-8, or from UTF-16LE, SHIFT-JIS, ...)"


def skipped_file_notes(corpus: Corpus) -> list[str]:
    """Return a note for each source whose folders hold files that are not read."""
    sources = zip(corpus.names, corpus.config.all_sources, corpus.passed_over, strict=True)
    return [
        f"{name}: passed over {others}: what does not match {', '.join(file_patterns(source))} is not read; name it in "
        "`paths` or set `pattern` to read it, `exclude` to do without this note"
        for name, source, others in sources
        if others
    ]


def _undecodable_notes(corpus: Corpus, results: dict[str, ChunkResult]) -> list[str]:
    """Return one note for each source that had documents dropped as not text."""
    counts = Counter[str]()
    for chunk in corpus.chunks:
        for split in results[chunk.name].splits.values():
            counts[chunk.source] += sum(split.dropped.get(defect, 0) for defect in DEFECTS)
    return [
        f"{name}: {count:,} document{'s' * (count > 1)} dropped as no text, because more than {MAX_UNDECODED:.0%} of "
        f"the characters could not be decoded or are NUL; {CONVERT_TO_UTF8}; --keep-rejects shows which"
        for name, count in (+counts).items()
    ]


def result_notes(corpus: Corpus, results: dict[str, ChunkResult]) -> tuple[str, ...]:
    """Return notes on undecodable documents, the encoders used, and what the documents were compared with."""
    used = Counter(result.encoder for result in results.values() if result.encoder)
    reasons = {result.encoder: result.why for result in reversed(results.values())}
    notes = _undecodable_notes(corpus, results)
    notes += [f"{count} of {len(results)} chunks encoded by {reasons[name]}" for name, count in used.items()]
    failures = sum(result.failures for result in results.values())
    if failures:
        notes.append(f"{failures} batches encoded by tokenizers, because gigatoken broke on them")
    dedup = corpus.config.dedup
    if dedup.minhash:
        similarity = f"{similarity_threshold(dedup.bands, dedup.rows):.2f}"
        notes.append(
            f"near-duplicates: half of the pairs of Jaccard similarity {similarity} are found, and more of closer ones"
        )
    evaluation = EvaluationNgrams.load(corpus.config.decontaminate)
    if evaluation is not None:
        notes.append(
            f"compared with {evaluation.n_texts:,} evaluation texts; {evaluation.n_too_short:,} more are too short for "
            "that"
        )
        if evaluation.skipped_files:
            notes.append(
                f"data.decontaminate.paths: passed over {evaluation.skipped_files}: only "
                f"{', '.join(EVALUATION_EXTENSIONS)} are read there"
            )
    return (*notes, *notes_on_held_out(corpus, results))


def _format_counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none at all"


def describe_dropped(corpus: Corpus, dropped: Mapping[str, int]) -> str:
    """Describe why no document is left, for an error: counts by reason, the sources, a remedy if they are not text."""
    return f"(documents read: {_format_counts(dropped)}): {corpus}" + (
        f"; {CONVERT_TO_UTF8}" if any(defect in dropped for defect in DEFECTS) else ""
    )


def check_splits_not_empty(corpus: Corpus, results: dict[str, ChunkResult]) -> None:
    """Raise DataError if a split would hold no documents."""
    config = corpus.config
    own = {chunk.name: results[chunk.name] for chunk in corpus.chunks if not corpus.is_held_out(chunk.source_index)}
    named = {name: result for name, result in results.items() if name not in own}
    n_train, n_held_out = count_documents(own, "train"), count_documents(own, "validation")
    if (
        config.validation
        and all(source.is_text for source in config.validation)
        and not count_documents(named, "validation")
    ):
        counts = _format_counts(_count_dropped(named))
        raise DataError(
            f"data.validation holds no text to keep (documents read: {counts}); name other text, or leave it out"
        )
    if any(not source.is_text for source in config.sources):
        return
    if not n_train + n_held_out:
        raise DataError(f"data.sources hold no text to keep {describe_dropped(corpus, _count_dropped(own))}")
    if config.validation_fraction > 0 and n_train + n_held_out == 1:
        raise DataError(
            "data.sources hold a single document to keep, so none can be held out; set data.validation_fraction=0, or "
            "split it (for example into a jsonl file with a document on every line)"
        )
    if not n_train:
        raise DataError(
            f"data.validation_fraction={config.validation_fraction} holds out all {n_held_out} documents; lower it, "
            "or, if data.sources name an id_field whose values are all the same, name another"
        )


def _count_dropped(results: Mapping[str, ChunkResult]) -> dict[str, int]:
    """Count the dropped documents of all splits by reason."""
    return sum_by_reason(split.dropped for result in results.values() for split in result.splits.values())
