"""Held-out text: how much of each source a validation reads, and warnings about sources that hold out too little."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, log10

from data_pipeline.reading.mixture import interleaved
from data_pipeline.reading.packing import count_sequences
from data_pipeline.settings import PrepareConfig, source_names
from data_pipeline.storage.manifest import SPLITS, SplitManifest

MIN_SEQUENCES = 8
"""With fewer held-out sequences, the validation loss says little about a source."""

MIN_DOCUMENTS = 4
"""The same for documents, because one long document does not represent its source."""

_MARGIN = 2
"""Warnings propose this many times the minimum, because the hash may select fewer documents than the fraction says."""

_MAX_PROPOSED_FRACTION = 0.2
"""The largest `data.validation_fraction` that a warning proposes."""


def allocate_validation_sequences(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Distribute a validation's budget of sequences over the sources. Sources without held-out sequences are left out.

    Sources get sequences in proportion to their sizes, but at least MIN_SEQUENCES each. The minimum is lower if a
    source has fewer sequences, or if the budget is too small for it: then it is an equal share of the budget. So a few
    more sequences than the budget may be read. A budget for all sequences reads all.

    Args:
        sizes: held-out sequences of each source.
        budget: sequences to read in total: `eval.batches` of `train.batch_size`.
    """
    sizes = {name: size for name, size in sizes.items() if size}
    budget = min(budget, sum(sizes.values()))
    if not budget:
        return {}
    least = min(MIN_SEQUENCES, max(1, budget // len(sizes)))
    proportional = interleaved(sizes).counts(budget)
    return {name: min(size, max(least, share)) for (name, size), share in zip(sizes.items(), proportional, strict=True)}


def format_held_out_counts(splits: Mapping[str, SplitManifest], seq_len: int) -> str:
    """Return a line with the number of held-out sequences of each source. Empty if nothing is held out."""
    held_out = splits.get("validation")
    if held_out is None:
        return ""
    counts = ", ".join(f"{source.name} {count_sequences(source.tokens, seq_len):,}" for source in held_out.sources)
    return f"held out, in sequences of {seq_len:,} tokens: {counts}"


def held_out_warnings(splits: Mapping[str, SplitManifest], seq_len: int) -> list[str]:
    """Return one warning, with a remedy, for each source that holds out some text, but too little.

    Args:
        splits: the manifests of a prepared data set.
        seq_len: `data.seq_len`.
    """
    settings = splits["train"].recipe.settings
    training, held_out = (
        {source.name: source for source in splits[split].sources} if split in splits else {} for split in SPLITS[::-1]
    )
    expected = set(source_names(settings)[len(settings.sources) :])  # the sources of data.validation
    if settings.validation_fraction:
        expected |= {*held_out, *training}
    else:
        expected |= {name for name, source in held_out.items() if source.documents}
    warnings = []
    for name in dict.fromkeys((*training, *held_out)):
        documents, tokens = (held_out[name].documents, held_out[name].tokens) if name in held_out else (0, 0)
        sequences = count_sequences(tokens, seq_len)
        if name not in expected or (sequences >= MIN_SEQUENCES and documents >= MIN_DOCUMENTS):
            continue
        if documents:
            are = "is" if documents == 1 else "are"
            what = f"only {_count(documents, 'document')} with {tokens:,} tokens {are} held out"
            what += f" ({_count(sequences, 'sequence')} of data.seq_len={seq_len}): its validation loss says little"
        else:
            what = "no document is held out: there is no validation loss of it"
        all_documents, all_tokens = documents, tokens
        if name in training:
            all_documents, all_tokens = documents + training[name].documents, tokens + training[name].tokens
        warnings.append(f"{name}: {what}; {_remedy(name, all_documents, all_tokens, seq_len, settings)}")
    return warnings


def _remedy(name: str, documents: int, tokens: int, seq_len: int, settings: PrepareConfig) -> str:
    """Return what to do to hold out more of a source with this many documents and tokens in all splits."""
    index = {name: i for i, name in enumerate(source_names(settings))}.get(name)
    if index is not None and index >= len(settings.sources):
        return f"name more text in {settings.source_setting(index)}"
    if index is not None and settings.sources[index].kind == "prepared":
        return "prepare that data with a larger data.validation_fraction, or name held-out text in data.validation"
    fraction = _MARGIN * max(MIN_SEQUENCES * seq_len / max(1, tokens), MIN_DOCUMENTS / max(1, documents))
    fraction = max(fraction, _MARGIN * settings.validation_fraction)  # the hash may have selected few documents
    if fraction > _MAX_PROPOSED_FRACTION:
        size = f"{_count(documents, 'document')}, {tokens:,} tokens"
        return f"it is small ({size}): add text, or name held-out text in data.validation"
    digit = 10.0 ** (floor(log10(fraction)) - 1)
    rounded = f"{ceil(fraction / digit - 1e-9) * digit:.2g}"
    return f"prepare it with data.validation_fraction={rounded}, or name held-out text in data.validation"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
