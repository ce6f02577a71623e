"""What a tokenizer does to text that it does not know, told from its `tokenizer.json`. `unknown_text.py` counts how often it did.

Three things may happen to a character without an id: an unknown token stands for it, byte tokens spell it, or it vanishes. Apart
from that, normalizers and some pre-tokenizers change the text itself before the model sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.tokenizing.tokenizer_formats import byte_characters

UNKNOWN_TOKENS = "has unknown tokens"
LOST_CHARACTERS = "lost characters"
NO_TOKENS = "encodes to nothing"
"""What the manifest calls documents that a tokenizer did not know, in part or as a whole."""

_IN_UTF8 = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
"""The 243 bytes that UTF-8 has (RFC 3629): no text needs a token of another."""

_FALLBACK = [f"<0x{byte:02X}>" for byte in _IN_UTF8]
_CHANGING = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents")


@dataclass(frozen=True)
class Coverage:
    """Which texts a tokenizer knows."""

    unknown_id: int | None
    """Id that stands for what it does not know; None where it has no such token."""
    unknown_token: str | None
    missing_bytes: int | None
    """How many of the 243 bytes of UTF-8 have no token; None where it does not work on bytes at all."""
    drops_unknown: bool
    """The model drops what it does not know; other models without an unknown token refuse the text."""
    text_changes: tuple[str, ...]
    """What it does to a text before its model sees it, a few words each."""

    @property
    def is_complete(self) -> bool:
        """Every character has ids."""
        return self.missing_bytes == 0

    @property
    def is_lossy(self) -> bool:
        """There is neither an id for every character nor one for unknown ones."""
        return not self.is_complete and self.unknown_id is None

    def describe(self) -> str:
        """What becomes of characters that have no id, in words."""
        if self.is_complete:
            return "none: every byte of UTF-8 has a token"
        if not self.is_lossy:
            return f"become {self.unknown_token}"
        return "vanish" if self.drops_unknown else "are refused"


def analyze_coverage(config: Mapping[str, Any]) -> Coverage:
    """What the tokenizer of the contents of a `tokenizer.json` does to text that it does not know."""
    model = config["model"]
    ids = (
        model["vocab"] if isinstance(model["vocab"], dict) else {name: i for i, (name, _) in enumerate(model["vocab"])}
    )
    unknown_id = model.get("unk_id") if _kind(model) == "Unigram" else ids.get(model.get("unk_token"))
    unknown_token = next((name for name, number in ids.items() if number == unknown_id), None)
    return Coverage(
        unknown_id=unknown_id,
        unknown_token=unknown_token,
        missing_bytes=_missing_bytes(config, ids),
        drops_unknown=_kind(model) == "BPE",
        text_changes=tuple(_changes(config)),
    )


def check_coverage(coverage: Coverage, name: str, allow_lossy: bool) -> None:
    """DataError where characters that a tokenizer does not know would vanish, or stop the preparation half way.

    Args:
        coverage: of the tokenizer.
        name: where it was loaded from.
        allow_lossy: the user has asked for such a tokenizer.
    """
    if allow_lossy or not coverage.is_lossy:
        return
    lacking = f" ({coverage.missing_bytes} of the 243 bytes of UTF-8 are missing)" if coverage.missing_bytes else ""
    then, why = (
        ("vanish", "prepare without them")
        if coverage.drops_unknown
        else ("stop the preparation", "try it all the same")
    )
    raise DataError(
        f"data.tokenizer={name} has neither an unknown token nor all bytes{lacking}: characters that it does not know would {then}; "
        f"use another data.tokenizer, or set data.allow_lossy_tokenizer=true to {why}"
    )


def coverage_notes(coverage: Coverage) -> list[str]:
    """What whoever prepares data should know of its tokenizer, a line each."""
    notes = []
    if coverage.text_changes:
        notes.append(
            f"the tokenizer changes text before it encodes it: {'; '.join(coverage.text_changes)}. Tokens decode to the changed text"
        )
    if coverage.is_lossy:
        notes.append(
            f"the tokenizer has neither an unknown token nor all bytes: characters that it does not know {coverage.describe()}"
        )
    return notes


def _kind(model: Mapping[str, Any]) -> str:
    """Its type, which old files do not name."""
    untold = "BPE" if "merges" in model else "Unigram" if isinstance(model["vocab"], list) else "word"
    return str(model.get("type", untold))


def _missing_bytes(config: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """How many of the 243 bytes of UTF-8 have no token, whichever way bytes are spelt; None where they are not."""
    model = config["model"]
    if _kind(model) not in ("BPE", "Unigram"):  # the others know whole words only
        return None
    ways = []
    if model.get("byte_fallback"):
        ways.append(_FALLBACK)
    if any(
        step.get("type") == "ByteLevel"
        for part in ("normalizer", "pre_tokenizer")
        for step in pipeline_steps(config, part)
    ):
        letters = byte_characters()
        ways.append([letters[byte] for byte in _IN_UTF8])
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    forms = {(before, after) for before in ("", prefix) for after in ("", suffix)}
    missing = [
        sum(
            any(
                f"{before}{name}{after}" not in ids for before, after in (forms if way is not _FALLBACK else {("", "")})
            )
            for name in way
        )
        for way in ways
    ]
    return min(missing, default=None)


def _changes(config: Mapping[str, Any]) -> Iterator[str]:
    """What changes the text before the model sees it."""
    for step in pipeline_steps(config, "normalizer"):
        kind = step.get("type")
        if kind == "Replace":
            yield f"Replace {_pattern(step)} by {step['content']!r}"
        elif kind == "Prepend":
            yield f"Prepend {step['prepend']!r}"
        elif kind == "Strip":
            sides = [side for side in ("left", "right") if step.get(f"strip_{side}")]
            yield f"Strip white space ({' and '.join(sides)})"
        elif kind == "Precompiled":
            yield "Precompiled (SentencePiece's table of characters)"
        elif kind == "BertNormalizer":
            accents = step["lowercase"] if step.get("strip_accents") is None else step["strip_accents"]
            flags = step | {"strip_accents": accents}
            on = [
                name for name in ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase") if flags.get(name)
            ]
            if on:
                yield f"BertNormalizer ({', '.join(on)})"
        elif kind in _CHANGING:
            yield kind
    for step in pipeline_steps(config, "pre_tokenizer"):
        kind = step.get("type")
        if kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer"):
            yield f"{kind} drops white space"
        elif kind == "CharDelimiterSplit":
            yield f"CharDelimiterSplit drops {step['delimiter']!r}"
        elif kind == "Split" and step["behavior"] == "Removed":
            yield f"Split drops {'all but ' if step.get('invert') else ''}{_pattern(step)}"
        elif kind == "Punctuation" and step.get("behavior") == "Removed":
            yield "Punctuation drops punctuation"
        elif kind == "Metaspace":
            front = "" if step.get("prepend_scheme") == "never" else " and puts one in front"
            yield f"Metaspace spells a space {step['replacement']!r}{front}"
        elif kind == "ByteLevel" and step.get("add_prefix_space"):
            yield "ByteLevel puts a space in front"
    for token in config.get("added_tokens", ()):
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            yield f"added token {token['content']!r} takes the white space beside it"


def _pattern(step: Mapping[str, Any]) -> str:
    return repr(next(iter(step["pattern"].values()))).replace("\\\\", "\\")


def pipeline_steps(config: Mapping[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""

    def walk(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if step.get("type") == "Sequence":
            for inner in step["pretokenizers" if part == "pre_tokenizer" else "normalizers"]:
                yield from walk(inner)
        else:
            yield step

    if config.get(part):
        yield from walk(config[part])
