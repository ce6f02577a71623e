"""Find out from a `tokenizer.json` which text the tokenizer cannot represent.

`unknown_text.py` counts such text in documents.

A character without an id either becomes an unknown token, is spelled by byte tokens, or vanishes. Independently of
that, normalizers and some pre-tokenizers change the text before the model sees it.
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
"""What the manifest calls documents that the tokenizer cannot fully represent."""

_UTF8_BYTES = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
"""The 243 bytes that occur in UTF-8 (RFC 3629). No text needs tokens for the others."""

_FALLBACK_TOKENS = [f"<0x{byte:02X}>" for byte in _UTF8_BYTES]
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents")


@dataclass(frozen=True)
class Coverage:
    """What a tokenizer does with characters that it has no ids for, and how it changes text."""

    unknown_id: int | None
    """Id of its unknown token; None if it has none."""
    unknown_token: str | None
    missing_bytes: int | None
    """How many of the 243 bytes of UTF-8 have no token; None if the tokenizer has no byte tokens at all."""
    drops_unknown: bool
    """Without an unknown token, the model drops unknown characters. Other models raise an error."""
    text_changes: tuple[str, ...]
    """How the text is changed before the model sees it, a short description of each change."""

    @property
    def is_complete(self) -> bool:
        """Whether every character has ids."""
        return self.missing_bytes == 0

    @property
    def is_lossy(self) -> bool:
        """Whether some character has no id and there is no unknown token for it."""
        return not self.is_complete and self.unknown_id is None

    def describe(self) -> str:
        """Describe what happens to characters without an id."""
        if self.is_complete:
            return "none: every byte of UTF-8 has a token"
        if not self.is_lossy:
            return f"become {self.unknown_token}"
        return "vanish" if self.drops_unknown else "are refused"


def analyze_coverage(config: Mapping[str, Any]) -> Coverage:
    """Return the coverage of a tokenizer, given the contents of its `tokenizer.json`."""
    model = config["model"]
    ids = (
        model["vocab"] if isinstance(model["vocab"], dict) else {name: i for i, (name, _) in enumerate(model["vocab"])}
    )
    unknown_id = model.get("unk_id") if _model_type(model) == "Unigram" else ids.get(model.get("unk_token"))
    unknown_token = next((name for name, number in ids.items() if number == unknown_id), None)
    return Coverage(
        unknown_id=unknown_id,
        unknown_token=unknown_token,
        missing_bytes=_missing_bytes(config, ids),
        drops_unknown=_model_type(model) == "BPE",
        text_changes=tuple(_changes(config)),
    )


def check_coverage(coverage: Coverage, name: str, allow_lossy: bool) -> None:
    """Raise DataError if unknown characters would vanish, or stop the preparation half way.

    Args:
        coverage: of the tokenizer.
        name: where it was loaded from.
        allow_lossy: never raise: the user accepts such a tokenizer.
    """
    if allow_lossy or not coverage.is_lossy:
        return
    missing = f" ({coverage.missing_bytes} of the 243 bytes of UTF-8 are missing)" if coverage.missing_bytes else ""
    if coverage.drops_unknown:
        consequence, purpose = "vanish", "prepare without them"
    else:
        consequence, purpose = "stop the preparation", "try it all the same"
    raise DataError(
        f"data.tokenizer={name} has neither an unknown token nor all bytes{missing}: characters that it does not know "
        f"would {consequence}; use another data.tokenizer, or set data.allow_lossy_tokenizer=true to {purpose}"
    )


def coverage_notes(coverage: Coverage) -> list[str]:
    """Return what the user should know about the tokenizer's coverage, one note each."""
    notes = []
    if coverage.text_changes:
        notes.append(
            f"the tokenizer changes text before it encodes it: {'; '.join(coverage.text_changes)}. "
            f"Tokens decode to the changed text"
        )
    if coverage.is_lossy:
        notes.append(
            f"the tokenizer has neither an unknown token nor all bytes: "
            f"characters that it does not know {coverage.describe()}"
        )
    return notes


def _model_type(model: Mapping[str, Any]) -> str:
    """Return the model's type, inferred for old files that do not name it."""
    inferred = "BPE" if "merges" in model else "Unigram" if isinstance(model["vocab"], list) else "word"
    return str(model.get("type", inferred))


def _missing_bytes(config: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """Return how many of the 243 bytes of UTF-8 have no token; None if the tokenizer has no byte tokens at all."""
    model = config["model"]
    if _model_type(model) not in ("BPE", "Unigram"):  # the others know only whole words
        return None
    spellings = []
    if model.get("byte_fallback"):
        spellings.append(_FALLBACK_TOKENS)
    if any(
        step.get("type") == "ByteLevel"
        for part in ("normalizer", "pre_tokenizer")
        for step in pipeline_steps(config, part)
    ):
        characters = byte_characters()
        spellings.append([characters[byte] for byte in _UTF8_BYTES])
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    affixed = {(before, after) for before in ("", prefix) for after in ("", suffix)}

    def count_missing(tokens: list[str]) -> int:
        affixes = {("", "")} if tokens is _FALLBACK_TOKENS else affixed
        return sum(any(f"{before}{token}{after}" not in ids for before, after in affixes) for token in tokens)

    return min(map(count_missing, spellings), default=None)


def _changes(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a description of each change to the text before the model sees it."""
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
            all_options = ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
            options = [option for option in all_options if flags.get(option)]
            if options:
                yield f"BertNormalizer ({', '.join(options)})"
        elif kind in _NORMALIZERS:
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


def pipeline_steps(config: Mapping[str, Any], stage: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a `normalizer` or `pre_tokenizer`, with sequences flattened."""

    def walk(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if step.get("type") == "Sequence":
            for inner in step["pretokenizers" if stage == "pre_tokenizer" else "normalizers"]:
                yield from walk(inner)
        else:
            yield step

    if config.get(stage):
        yield from walk(config[stage])
