"""Held-out text: what a validation reads of each source, and which sources hold out too little for it to mean something."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, log10

from data_pipeline.reading.mixture import in_turn
from data_pipeline.reading.packing import count_sequences
from data_pipeline.settings import PrepareConfig, source_names
from data_pipeline.storage.manifest import Manifest

LEAST_SEQUENCES = 8
"""The loss over fewer held-out sequences than this says little about a source."""

_LARGEST_FRACTION = 0.2
"""The largest data.validation_fraction that a warning proposes."""


def sequences_to_read(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """How many held-out sequences of each source a validation reads, from the source's first on; sources without any are left out.

    A budget for all reads all. A smaller one is shared out in proportion to the sizes, but a source gets at least LEAST_SEQUENCES, or
    all it has, or as many as an equal share would give it. So a few more than the budget may be read.

    Args:
        sizes: held-out sequences of each source.
        budget: sequences to read together, `eval.batches` of `train.batch_size`.
    """
    sizes = {name: size for name, size in sizes.items() if size}
    budget = min(budget, sum(sizes.values()))
    if not budget:
        return {}
    least = min(LEAST_SEQUENCES, max(1, budget // len(sizes)))
    proportional = in_turn(sizes).counts(budget)
    return {name: min(size, max(least, share)) for (name, size), share in zip(sizes.items(), proportional, strict=True)}


def held_out_line(splits: Mapping[str, Manifest], seq_len: int) -> str:
    """One line: how many sequences of each source are held out. Empty where nothing is."""
    held_out = splits.get("validation")
    if held_out is None:
        return ""
    counts = ", ".join(f"{source.name} {count_sequences(source.tokens, seq_len):,}" for source in held_out.sources)
    return f"held out, in sequences of {seq_len:,} tokens: {counts}"


def held_out_warnings(splits: Mapping[str, Manifest], seq_len: int) -> list[str]:
    """A line for each source of which fewer than LEAST_SEQUENCES are held out, with what to set. Nothing where none was asked for.

    Args:
        splits: the manifests of a prepared data set.
        seq_len: `data.seq_len`.
    """
    settings = splits["train"].recipe.settings
    held_out = {source.name: source for source in splits["validation"].sources} if "validation" in splits else {}
    training = {source.name: source.tokens for source in splits["train"].sources}
    asked = {*held_out, *training} if settings.validation_fraction else {name for name, source in held_out.items() if source.documents}
    told = []
    for name in dict.fromkeys((*training, *held_out)):
        documents, tokens = (held_out[name].documents, held_out[name].tokens) if name in held_out else (0, 0)
        sequences = count_sequences(tokens, seq_len)
        if name not in asked or sequences >= LEAST_SEQUENCES:
            continue
        way_out = _way_out(name, training.get(name, 0) + tokens, seq_len, settings)
        if not documents:
            told.append(f"{name}: no document is held out, so there is no validation loss of it; {way_out}")
            continue
        what = f"{_count(documents, 'document')}, {tokens:,} tokens, {_count(sequences, 'sequence')} of data.seq_len={seq_len}"
        told.append(f"{name}: only {what}, held out, so its validation loss says little; {way_out}")
    return told


def _way_out(name: str, tokens: int, seq_len: int, settings: PrepareConfig) -> str:
    """What to set to hold out more of a source of so many tokens."""
    kinds = {name: source.kind for name, source in zip(source_names(settings.sources), settings.sources, strict=True)}
    if kinds.get(name) == "prepared":
        return "prepare that data with a larger data.validation_fraction"
    fraction = LEAST_SEQUENCES * seq_len / max(1, tokens)
    if fraction <= settings.validation_fraction:  # the hash drew few of them
        fraction = 2 * settings.validation_fraction
    if fraction > _LARGEST_FRACTION:
        return f"it holds {tokens:,} tokens in all: add text, or lower data.seq_len"
    digit = 10.0 ** (floor(log10(fraction)) - 1)
    return f"data.validation_fraction={ceil(fraction / digit - 1e-9) * digit:.2g} would hold out about {LEAST_SEQUENCES} sequences"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
