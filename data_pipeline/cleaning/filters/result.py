"""The result of a filter on a document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.text.sources import Document


@dataclass(frozen=True, slots=True)
class FilterResult:
    """Dropped for a reason, or kept with the text that is left."""

    text: str
    """The text to keep. It differs from the document's only if the document is kept and a filter edited it (`c4`)."""
    reason: str | None = None
    """Why the document is dropped; None keeps it."""
    repairs: tuple[str, ...] = ()
    """How the text was edited, for the counts of repaired documents."""


DocumentFilter = Callable[[Document], FilterResult]
