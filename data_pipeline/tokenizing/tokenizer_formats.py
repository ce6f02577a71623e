"""Tokenizers of other makers as one `tokenizers` JSON that gives the ids of their own libraries: tiktoken ranks, SentencePiece models.

Knows files and vocabularies; encodes nothing. SentencePiece's description of its file is imported where it is used.
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

SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Where a token may not cross: the published pattern of GPT-4 and Llama 3 (arXiv:2407.21783). Digits go in threes, and line
breaks with their indentation, which shortens source code by 5% against the pattern of GPT-2."""

_CAPITALS, _SMALL, _ENDING = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_SPLIT_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FEW = 256
"""Special tokens that `keep_apart` lists one by one; more make a tree. The pattern is part of the fingerprint of data prepared before."""

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
"""What a file of ranks does not say, by its name: the pattern (none: the one of GPT-2) and the special tokens, as OpenAI published them."""


def read_tokenizer_config(path: Path) -> tuple[Path, dict[str, Any]]:
    """(file, its tokenizer as the contents of a `tokenizer.json`) of a file, or of a folder, where `tokenizer.json` goes first.

    Raises:
        DataError: there is no tokenizer, more than one, or one that we do not know how to read.
    """
    file = _file_of(path)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"data.tokenizer: cannot read {file}: {error.strerror}; name a tokenizer.json or a folder that holds one"
        ) from None
    if file.suffix == ".tiktoken" or re.match(
        rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw
    ):  # Llama 3 calls its ranks tokenizer.model
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
    """Pre-tokenizer: the text is cut by `pattern` (none: GPT-2's), its UTF-8 bytes are spelt as 256 printable characters.

    With `max_piece`, pieces of more characters are cut again, after every so many.
    """
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    if pattern is None:
        return spell
    again = [] if max_piece is None else [{"type": "FixedLength", "length": max_piece}]
    return _sequence(_split(pattern), *again, spell)


BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def make_tokenizer_config(special: Mapping[str, int], model: Mapping[str, Any], **parts: object) -> dict[str, Any]:
    """The contents of a `tokenizer.json`; `parts` are its normalizer, pre_tokenizer and decoder."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": name} | flags for name, number in special.items()]
    steps = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None} | parts
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **steps, "model": dict(model)}


def _bpe(vocab: dict[str, int], merges: Iterable[Sequence[str]], **settings: object) -> dict[str, Any]:
    names = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **names, **flags, **settings, "vocab": vocab, "merges": list(merges)}


def from_tiktoken(raw: bytes, file: Path) -> dict[str, Any]:
    """The tokenizer of a file of ranks: lines of a token in base64 and its rank.

    Any two neighbours that together are a token may merge, the lowest rank first; so every way to cut a token in two is a merge.
    """
    if file.stem not in TIKTOKEN_ENCODINGS:
        raise DataError(
            f"data.tokenizer: {file} holds tiktoken ranks, which do not tell how text is split nor what the special tokens are; known by "
            f"their file's name are {', '.join(f'{name}.tiktoken' for name in TIKTOKEN_ENCODINGS)}. Give the tokenizer.json of any other"
        )
    try:
        lines = [line.split() for line in raw.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise DataError(f"data.tokenizer: {file} is not a file of tiktoken ranks: {error}") from None
    if missing := 256 - sum(len(token) == 1 for token in ranks):
        raise DataError(f"data.tokenizer: {file}: {missing} of the 256 bytes have no rank; the file is not whole")
    pattern, special = TIKTOKEN_ENCODINGS[file.stem]
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    spell = byte_characters()
    spelt = {token: "".join(map(spell.__getitem__, token)) for token in ranks}
    vocab = {spelt[token]: rank for token, rank in ranks.items()} | special
    model = _bpe(vocab, ([spelt[left], spelt[right]] for left, right in merges), ignore_merges=True)
    return make_tokenizer_config(special, model, pre_tokenizer=byte_level(pattern), decoder=BYTE_LEVEL_DECODER)


def byte_characters() -> dict[int, str]:
    """How GPT-2 spells bytes: Latin-1 characters one can see are themselves, the others follow from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(unseen)}


def from_sentencepiece(raw: bytes, file: Path) -> dict[str, Any]:
    """The tokenizer of a SentencePiece model (arXiv:1808.06226), BPE or Unigram.

    It differs from SentencePiece where a text spells out a control or byte piece such as `</s>`: here no token crosses the second
    character of it in Unigram models; and NFKC of some rare sequences of combining marks is that of `tokenizers`.
    """
    model = _parse_sentencepiece(raw, file)
    trainer, rules = model.trainer_spec, model.normalizer_spec
    kinds = type(model.pieces[0])
    unsupported = {
        "a word or character model": trainer.model_type not in (trainer.UNIGRAM, trainer.BPE),
        "white space at the end of pieces (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
        "unescaped white space": not rules.escape_whitespaces,
        "unused pieces": any(piece.type == kinds.UNUSED for piece in model.pieces),
    }
    if found := [name for name, there in unsupported.items() if there]:
        raise DataError(
            f"data.tokenizer: {file} is a SentencePiece model with {found[0]}, which we cannot read; give its tokenizer.json"
        )
    names = [piece.piece for piece in model.pieces]
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == kinds.UNKNOWN)
    of_user = sorted(
        (piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED), key=lambda name: (-len(name), name)
    )
    special = {
        piece.piece: number for number, piece in enumerate(model.pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
    }
    if trainer.model_type == trainer.UNIGRAM:
        scores = [[piece.piece, piece.score] for piece in model.pieces]
        body = {"type": "Unigram", "unk_id": unknown, "byte_fallback": trainer.byte_fallback, "vocab": scores}
    else:
        merges = _merges_of({piece.piece: piece.score for piece in model.pieces if piece.type == kinds.NORMAL})
        vocab = {name: number for number, name in enumerate(names)}
        body = _bpe(
            vocab,
            merges,
            unk_token=names[unknown],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(of_user),
        )
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if rules.add_dummy_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    cut = _split("|".join(map(_literal, of_user))) if of_user else None
    return make_tokenizer_config(special, body, normalizer=_normalizer(model), pre_tokenizer=cut, decoder=decoder)


def _parse_sentencepiece(
    raw: bytes, file: Path
) -> Any:  # Any: protobuf makes its classes at run time, type checkers see none
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


def _normalizer(model: Any) -> dict[str, Any]:
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
    """Every way to cut a piece in two pieces, the best score first."""
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        merges += [[piece[:i], piece[i:]] for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
    return merges


def split_special_tokens(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A tokenizer whose model never gets to see one of `names` whole: a last cut of the text goes through each after its first character.

    For the special and byte pieces in the vocabulary of a model that would otherwise find them in a text. The same again changes nothing.
    """
    names = sorted(names)
    if len(names) <= _FEW:
        patterns = [f"{_literal(name[0])}(?={_literal(name[1:])})" for name in names]
    else:  # thousands of alternatives would be tried one by one wherever a text has their first character
        groups = {first: [name[1:] for name in found] for first, found in groupby(names, itemgetter(0))}
        patterns = [f"{_literal(first)}(?={_any_of(rest)})" for first, rest in groups.items()]
    if config["model"].get("byte_fallback"):
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    steps = config.get("pre_tokenizer")
    before = steps["pretokenizers"] if steps and steps.get("type") == "Sequence" else [steps] if steps else []
    cut = _split("|".join(patterns))
    return {**config, "pre_tokenizer": _sequence(*before, *([] if cut in before else [cut]))}


def _any_of(texts: Sequence[str]) -> str:
    """A pattern that matches each of some sorted texts, and decides by one character after the other."""
    first, last = texts[0], texts[-1]
    shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    rest = [text[shared:] for text in texts]  # they are sorted: what the first and the last begin with, all begin with
    if "" in rest:  # where a longer one matches, this one does
        return _literal(first)
    return (
        f"{_literal(first[:shared])}(?:{'|'.join(_any_of(list(found)) for _, found in groupby(rest, itemgetter(0)))})"
    )


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _literal(text: str) -> str:
    """A pattern of Oniguruma that matches `text`; `re.escape` knows another language, in which `#` and space need it."""
    return re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", text)
