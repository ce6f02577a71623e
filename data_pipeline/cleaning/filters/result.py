"""What a filter says of a document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.text.sources import Document


@dataclass(frozen=True, slots=True)
class FilterResult:
    """Dropped for a reason, or kept with the text that is left."""

    text: str
    """What to keep of the text: all of it, unless a filter that edits (`c4`) judged. Of a dropped document: all of it."""
    reason: str | None = None
    """Why it is dropped; None keeps it."""
    repairs: tuple[str, ...] = ()
    """How the text was changed, for the counts of repaired documents."""


DocumentFilter = Callable[[Document], FilterResult]
