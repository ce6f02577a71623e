"""Convert tiktoken ranks and SentencePiece models to a `tokenizer.json` that gives the same ids as their own libraries.

This module does not encode. SentencePiece's file format is imported only where it is used.
"""

from __future__ import annotations

import base64
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

END_OF_TEXT = "<|endoftext|>"

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pre-tokenization pattern of GPT-4 and Llama 3 (arXiv:2407.21783): no token crosses a split. Digits are grouped in
threes, and line breaks with their indentation, which needs 5% fewer tokens for source code than GPT-2's pattern."""

_CAPITALS, _SMALL, _ENDING = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_SPLIT_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_ALTERNATIVES = 256
"""Special tokens that `split_special_tokens` lists as plain alternatives; more become a prefix tree. Another limit
would change the pattern, and so the fingerprint of tokenizers with which data was prepared before."""

_MIDDLES = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")

TIKTOKEN_ENCODINGS: dict[str, tuple[str | None, dict[str, int]]] = {
    "r50k_base": (None, {END_OF_TEXT: 50256}),
    "p50k_base": (None, {END_OF_TEXT: 50256}),
    "cl100k_base": (
        SPLIT_PATTERN,
        {END_OF_TEXT: 100257} | dict(zip(_MIDDLES, range(100258, 100261), strict=True)) | {"<|endofprompt|>": 100276},
    ),
    "o200k_base": (_SPLIT_O200K, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}
"""What a file of ranks lacks, by its name: the pattern (None is GPT-2's) and the special tokens, as OpenAI published
them."""


def read_tokenizer_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """Read a tokenizer file in any supported format, or the one in a folder, where `tokenizer.json` takes precedence.

    Returns:
        The file, and its tokenizer as the contents of a `tokenizer.json`.

    Raises:
        DataError: there is no tokenizer, more than one, or one in an unsupported format.
    """
    file = _file_of(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"data.tokenizer: cannot read {file}: {error.strerror}; name a tokenizer.json or a folder that holds one"
        ) from None
    # Detected by content as well, because Llama 3's ranks are in a file named tokenizer.model.
    if file.suffix == ".tiktoken" or re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw):
        return file, from_tiktoken(raw, file)
    if file.suffix == ".model":
        return file, from_sentencepiece(raw, file)
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise DataError(f"data.tokenizer: {file} is not a tokenizer.json: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"data.tokenizer: {file} is not a tokenizer.json: it holds a {type(config).__name__}")
    return file, config


def _file_of(path: Path) -> Path:
    if not path.is_dir() or (path / "tokenizer.json").exists():
        return path / "tokenizer.json" if path.is_dir() else path
    files = sorted((*path.glob("*.tiktoken"), *path.glob("*.model")))
    if len(files) > 1:
        raise DataError(
            f"data.tokenizer: {path} holds {', '.join(file.name for file in files)}; name the one that you mean"
        )
    return files[0] if files else path / "tokenizer.json"


def byte_level(pattern: str | None, max_piece: int | None = None) -> dict[str, Any]:
    """Return a pre-tokenizer that splits the text by a pattern and spells its UTF-8 bytes as printable characters.

    Args:
        pattern: where to split; None is GPT-2's pattern.
        max_piece: split longer pieces after this many characters; None does not. Needs a `pattern`.
    """
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    if pattern is None:
        return spell
    limit = [] if max_piece is None else [{"type": "FixedLength", "length": max_piece}]
    return _sequence(_split(pattern), *limit, spell)


BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def make_tokenizer_config(special: Mapping[str, int], model: Mapping[str, Any], **stages: object) -> dict[str, Any]:
    """Return the contents of a `tokenizer.json`; `stages` are its normalizer, pre_tokenizer and decoder."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": name} | flags for name, number in special.items()]
    steps = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None} | stages
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **steps, "model": dict(model)}


def _bpe(vocab: dict[str, int], merges: Iterable[Sequence[str]], **settings: object) -> dict[str, Any]:
    names = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **names, **flags, **settings, "vocab": vocab, "merges": list(merges)}


def from_tiktoken(raw: bytes, file: Path) -> dict[str, Any]:
    """Convert a file of tiktoken ranks, whose lines hold a token in base64 and its rank.

    tiktoken merges any two neighbors that together are a token, the lowest rank first. So every split of a token into
    two tokens becomes a merge rule.
    """
    if file.stem not in TIKTOKEN_ENCODINGS:
        known = ", ".join(f"{name}.tiktoken" for name in TIKTOKEN_ENCODINGS)
        raise DataError(
            f"data.tokenizer: {file} holds tiktoken ranks, which do not say how to split text or what the special "
            f"tokens are. That is known for files named {known}; for any other, give its tokenizer.json"
        )
    try:
        lines = [line.split() for line in raw.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise DataError(f"data.tokenizer: {file} is not a file of tiktoken ranks: {error}") from None
    if missing := 256 - sum(len(token) == 1 for token in ranks):
        raise DataError(f"data.tokenizer: {file}: {missing} of the 256 bytes have no rank; the file is incomplete")
    pattern, special = TIKTOKEN_ENCODINGS[file.stem]
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    characters = byte_characters()
    spelled = {token: "".join(map(characters.__getitem__, token)) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    model = _bpe(vocab, ([spelled[left], spelled[right]] for left, right in merges), ignore_merges=True)
    return make_tokenizer_config(special, model, pre_tokenizer=byte_level(pattern), decoder=BYTE_LEVEL_DECODER)


def byte_characters() -> dict[int, str]:
    """Return GPT-2's character for each byte: a visible Latin-1 character is itself, the others start at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    invisible = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(invisible)}


def from_sentencepiece(raw: bytes, file: Path) -> dict[str, Any]:
    """Convert a SentencePiece model (arXiv:1808.06226), BPE or Unigram.

    Its ids differ from SentencePiece's in two cases. In Unigram models, if a text spells out a control or byte piece
    such as `</s>`, no token crosses the second character of it. And NFKC of some rare sequences of combining marks is
    that of `tokenizers`.
    """
    model = _parse_sentencepiece(raw, file)
    trainer, rules = model.trainer_spec, model.normalizer_spec
    piece_types = type(model.pieces[0])
    unsupported = {
        "a word or character model": trainer.model_type not in (trainer.UNIGRAM, trainer.BPE),
        "white space at the end of pieces (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
        "unescaped white space": not rules.escape_whitespaces,
        "unused pieces": any(piece.type == piece_types.UNUSED for piece in model.pieces),
    }
    if found := [feature for feature, is_used in unsupported.items() if is_used]:
        raise DataError(
            f"data.tokenizer: {file} is a SentencePiece model with {found[0]}, which is not supported; "
            f"give its tokenizer.json"
        )
    names = [piece.piece for piece in model.pieces]
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == piece_types.UNKNOWN)
    user_defined = sorted(
        (piece.piece for piece in model.pieces if piece.type == piece_types.USER_DEFINED),
        key=lambda name: (-len(name), name),
    )
    special = {
        piece.piece: number
        for number, piece in enumerate(model.pieces)
        if piece.type in (piece_types.CONTROL, piece_types.UNKNOWN)
    }
    if trainer.model_type == trainer.UNIGRAM:
        scores = [[piece.piece, piece.score] for piece in model.pieces]
        body = {"type": "Unigram", "unk_id": unknown, "byte_fallback": trainer.byte_fallback, "vocab": scores}
    else:
        merges = _merges_of({piece.piece: piece.score for piece in model.pieces if piece.type == piece_types.NORMAL})
        vocab = {name: number for number, name in enumerate(names)}
        body = _bpe(
            vocab,
            merges,
            unk_token=names[unknown],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(user_defined),
        )
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if rules.add_dummy_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    split = _split("|".join(map(_escape, user_defined))) if user_defined else None
    return make_tokenizer_config(special, body, normalizer=_normalizer(model), pre_tokenizer=split, decoder=decoder)


def _parse_sentencepiece(raw: bytes, file: Path) -> Any:  # Any: protobuf makes its classes at run time
    try:
        message = importlib.import_module("google.protobuf.message")
        model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    except ImportError as error:
        raise DataError(
            f"data.tokenizer: {file} is a SentencePiece model: pip install 'pretrain[tokenizers]' ({error})"
        ) from None
    try:
        model.ParseFromString(raw)
    except message.DecodeError as error:
        raise DataError(f"data.tokenizer: {file} is not a SentencePiece model: {error}") from None
    if not model.pieces:
        raise DataError(f"data.tokenizer: {file} is not a SentencePiece model: it holds no pieces")
    return model


def _normalizer(model: Any) -> dict[str, Any]:  # Any: as `_parse_sentencepiece`
    rules, steps = model.normalizer_spec, list[dict[str, Any]]()
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {"type": "Sequence", "normalizers": steps}


def _merges_of(scores: Mapping[str, float]) -> list[list[str]]:
    """Return every split of a piece into two pieces, in descending order of the whole piece's score."""
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        merges += [[piece[:i], piece[i:]] for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
    return merges


def split_special_tokens(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Add a pre-tokenization step that splits each of `names` after its first character, to hide it from the model.

    For special and byte pieces in a model's vocabulary, which the model would otherwise match in a text. Idempotent.
    """
    names = sorted(names)
    if len(names) <= _MAX_ALTERNATIVES:
        patterns = [f"{_escape(name[0])}(?={_escape(name[1:])})" for name in names]
    else:  # the engine would try thousands of alternatives one by one wherever their first character occurs
        groups = {first: [name[1:] for name in found] for first, found in groupby(names, itemgetter(0))}
        patterns = [f"{_escape(first)}(?={_prefix_tree_pattern(rest)})" for first, rest in groups.items()]
    if config["model"].get("byte_fallback"):
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    steps = config.get("pre_tokenizer")
    before = steps["pretokenizers"] if steps and steps.get("type") == "Sequence" else [steps] if steps else []
    split = _split("|".join(patterns))
    return {**config, "pre_tokenizer": _sequence(*before, *([] if split in before else [split]))}


def _prefix_tree_pattern(texts: Sequence[str]) -> str:
    """Return a pattern that matches any of the sorted texts, and branches by character, which is faster."""
    first, last = texts[0], texts[-1]
    # The texts are sorted, so the common prefix of the first and the last is that of all.
    shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    rest = [text[shared:] for text in texts]
    if "" in rest:  # the shortest text is a prefix of all others, so it matches wherever they do
        return _escape(first)
    branches = "|".join(_prefix_tree_pattern(list(found)) for _, found in groupby(rest, itemgetter(0)))
    return f"{_escape(first[:shared])}(?:{branches})"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _escape(text: str) -> str:
    """Escape `text` for Oniguruma, in which, unlike for `re.escape`, `#` and space must not be escaped."""
    return re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", text)
