"""What the tests of filters share: a good document, and short ways to filter one."""

from typing import Any

from data_pipeline.cleaning.filters import (
    build_filter,
)
from data_pipeline.settings import FilterConfig, FilterName
from data_pipeline.text.sources import Document

DATATROVE_FILTERS: tuple[FilterName, ...] = ("gopher_quality", "gopher_repetition", "c4", "fineweb")


GOOD = """The harbour of the town was built by monks in the ninth century, when the river still reached its walls.
Merchants from the north came with amber and furs, and sailed home with salt, wine and heavy cloth.
A flood in 1362 moved the river bed two miles to the east, so that ships could no longer be unloaded there!
Would anybody have believed that the quiet meadow beside the church had once been full of masts and shouting sailors?
Only the names of a few narrow streets remember them, and the carved fish above an old door that tourists \
like to photograph.
Today a small museum shows what was found in the mud: "coins, combs, dice and a leather shoe \
that fits a child of seven."
"""


ONE_LINE = GOOD.replace("\n", " ")


def doc(text: str, **metadata: object) -> Document:
    return Document(
        id="d7",
        text=text,
        source="web",
        metadata=metadata,
        n_bytes=len(text.encode()),
        had_invalid_unicode=False,
        bytes_read=0,
    )


def filter_config(**filters: Any) -> FilterConfig:
    return FilterConfig.model_validate(filters)


def drop_reason(name: FilterName, text: str, **overrides: Any) -> str | None:
    return build_filter(filter_config(**{name: overrides}), [name])(doc(text)).reason


def numbered(n: int, line: str = "Line number {} tells of its own matter to you and that of others.") -> str:
    return "\n".join(line.format(chr(ord("a") + i % 26) * (2 + i // 26)) for i in range(n))
