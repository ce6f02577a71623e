"""How a prepared data set was made, for display: the settings that influenced it, and the files they referred to."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.cleaning.minhash import similarity_threshold
from data_pipeline.settings import PrepareConfig, Settings, source_names
from data_pipeline.storage.manifest import SplitManifest
from data_pipeline.tokenizing.tokenizer import Tokenizer


@dataclass(frozen=True)
class RecipeEntry:
    """A line of the displayed recipe."""

    name: str
    value: str
    changed: bool = False
    """Whether the value differs from the default."""


def describe_recipe(manifest: SplitManifest, tokenizer: Tokenizer) -> dict[str, tuple[RecipeEntry, ...]]:
    """Return the settings that influenced the data, by section, with what they referred to at that time."""
    coverage = tokenizer.coverage
    recipe, settings = manifest.recipe, manifest.recipe.settings
    filters, dedup, clean = settings.filters, settings.dedup, settings.decontaminate
    entries = _recipe_sources(manifest)
    n_sources = len(settings.sources)
    sections: dict[str, tuple[RecipeEntry, ...]] = {
        "sources": entries[:n_sources],
        "held-out text": entries[n_sources:],
    }
    of_sources = {name for source in settings.all_sources for name in source.filters or ()}
    used = [*filters.apply, *(name for name in type(filters).model_fields if name in of_sources - set(filters.apply))]
    sections["filters"] = (RecipeEntry("apply", ", ".join(filters.apply) or "none", bool(filters.apply)),)
    if used:
        sections["filters"] += _entries(filters, "language_of_rules")
    for name in used:
        sections[f"filters.{name}"] = _entries(getattr(filters, name))
    sections["dedup"] = _entries(dedup, "exact", "minhash", *(("ngram", "bands", "rows") if dedup.minhash else ()))
    if dedup.minhash:
        half = similarity_threshold(dedup.bands, dedup.rows)
        sections["dedup"] += (
            RecipeEntry("found", f"half of the pairs of Jaccard similarity {half:.2f}, more of closer ones"),
        )
    sections["decontaminate"] = _entries(clean, "paths", *(("ngram", "action") if clean.paths else ()))
    sections["tokenizer"] = (
        RecipeEntry("fingerprint", tokenizer.fingerprint),
        RecipeEntry("vocabulary", f"{tokenizer.vocab_size:,} ids"),
        RecipeEntry("unknown characters", coverage.describe(), coverage.is_lossy),
        *((RecipeEntry("changes text", "; ".join(coverage.text_changes), True),) if coverage.text_changes else ()),
        RecipeEntry("made", "trained on these sources" if recipe.trained_tokenizer else "there before"),
        *(
            _entries(settings, "tokenizer_kind", "vocab_size", "tokenizer_sample_mb")
            if recipe.trained_tokenizer
            else ()
        ),
    )
    sections["shards"] = _entries(settings, "validation_fraction", "shard_tokens")
    sections["made with"] = tuple(RecipeEntry(name, version) for name, version in recipe.made_with.items())
    return {name: entries for name, entries in sections.items() if entries}


def _recipe_sources(manifest: SplitManifest) -> tuple[RecipeEntry, ...]:
    settings: PrepareConfig = manifest.recipe.settings
    entries = []
    passed_over = manifest.recipe.passed_over or (None,) * len(settings.all_sources)
    of_sources = zip(source_names(settings), settings.all_sources, manifest.recipe.listings, passed_over, strict=True)
    for name, source, listing, others in of_sources:
        own = "" if source.filters is None else f"; filters: {', '.join(source.filters) or 'none'}"
        own += f"; passed over: {others}" if others else ""
        entries.append(
            RecipeEntry(name, f"{source.kind} {', '.join(source.paths)}{f' ({listing})' if listing else ''}{own}")
        )
    return tuple(entries)


def _entries(settings: Settings, *names: str) -> tuple[RecipeEntry, ...]:
    """Return entries for the named fields, or for all fields if no names are given."""
    fields = type(settings).model_fields
    return tuple(
        RecipeEntry(
            name,
            _format_value(value := getattr(settings, name)),
            value != fields[name].get_default(call_default_factory=True, validated_data=dict(settings)),
        )
        for name in names or fields
    )


def _format_value(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
