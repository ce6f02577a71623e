"""Train a byte-level tokenizer, load one in any format, and convert text to ids and back."""

from __future__ import annotations

import heapq
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import xxhash
from tokenizers import models, pre_tokenizers, trainers

from data_pipeline.atomic import write_atomic
from data_pipeline.errors import DataError
from data_pipeline.text.sources import Document
from data_pipeline.tokenizing.coverage import Coverage, analyze_coverage
from data_pipeline.tokenizing.tokenizer_formats import (
    BYTE_LEVEL_DECODER,
    END_OF_TEXT,
    SPLIT_PATTERN,
    byte_level,
    make_tokenizer_config,
    read_tokenizer_config,
    split_special_tokens,
)

KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "[EOS]")
"""The end-of-text token of GPT, Qwen, Llama 3, Llama 2, Mistral, Gemma, DeepSeek and others."""

MAX_PIECE = 512
"""Characters of the longest piece that a trainer gets. SentencePiece skips lines of more than 4,192 bytes; 512
characters are at most 4,096 bytes once their UTF-8 bytes are spelled as printable characters."""

_PIECES = re.compile(r"[^\W\d_]+|(?:[^\w\s]|_)+|\s+")
"""Runs of letters, of punctuation and of white space: about what SPLIT_PATTERN does not split. It splits digits in
threes."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. It encodes special tokens that a text spells out as text; their ids are only added by id."""

    backend: tokenizers.Tokenizer
    vocab_size: int
    """Highest id + 1."""
    eot_id: int
    """Id of the end-of-text token, which ends every document."""
    fingerprint: str
    """XXH3-128 of the canonical JSON of the `tokenizer.json`, to which other formats are converted."""
    coverage: Coverage
    """Which text it can represent."""
    _json: str = field(repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Notes for the user from its training."""

    def to_json(self) -> str:
        """Return the contents of a `tokenizer.json` that loads as this tokenizer."""
        return self._json

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without beginning or end tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without beginning or end tokens. Uses all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, with special tokens spelled out.

        Bytes that are not UTF-8 become U+FFFD, as of half a character.
        """
        return str(self.backend.decode(list(ids), skip_special_tokens=False))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, a file of tiktoken ranks, a SentencePiece model, or a folder with one of these.

    Raises:
        DataError: the tokenizer is missing, broken or in an unknown format, or has none of KNOWN_END_TOKENS.
    """
    file, config = read_tokenizer_config(path)
    backend = build_backend(config, file)
    if reachable := _reachable_special_tokens(config, backend):
        config = split_special_tokens(config, reachable)
        backend = build_backend(config, file)
    special = {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    end = next((name for name in KNOWN_END_TOKENS if name in special), None)
    if end is None:
        raise DataError(
            f"data.tokenizer: {file} has no end-of-text token among its special tokens "
            f"({', '.join(special) or 'none'}); it must be one of "
            f"{', '.join(KNOWN_END_TOKENS)} among the added_tokens of a tokenizer.json"
        )
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    text = json.dumps(config, ensure_ascii=False, separators=(",", ":")) + "\n"
    return Tokenizer(
        backend, vocab_size, special[end], xxhash.xxh3_128_hexdigest(canonical), analyze_coverage(config), text
    )


def build_backend(config: Mapping[str, Any], file: Path | str) -> tokenizers.Tokenizer:
    """Build a tokenizer from the contents of a `tokenizer.json`; `file` names it in errors."""
    try:
        backend = tokenizers.Tokenizer.from_buffer(json.dumps(config, ensure_ascii=False).encode())
    except ValueError as error:
        raise DataError(f"data.tokenizer: {file} is not a tokenizer.json: {error}") from error
    # Files from the hub may set truncation, which would silently drop text.
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None  # BPE dropout would give the same text other ids every time
    backend.encode_special_tokens = True
    return backend


def _reachable_special_tokens(config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> set[str]:
    """Return the special tokens that ordinary text with the same characters would be encoded to.

    They are in its vocabulary, and pre-tokenization does not split them. In addition, BPE reaches them only through a
    merge, or if it looks up whole words first (`ignore_merges`); the other models match every entry of the vocabulary.
    """
    model = config["model"]
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {name for name, _ in model["vocab"]}
    special = {
        token["content"] for token in config.get("added_tokens", ()) if token["special"] and token["content"] in vocab
    }
    if "merges" in model and not model.get("ignore_merges"):
        special &= {
            merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]
        }
    splitter = backend.pre_tokenizer
    if splitter is None:
        return special
    return {name for name in special if any(name in piece for piece, _ in splitter.pre_tokenize_str(name))}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, file: Path, kind: Literal["bpe", "unigram"] = "bpe"
) -> Tokenizer:
    """Train a byte-level tokenizer and write it to `file` atomically. The same texts give the same file.

    Every byte has an id, so any text can be encoded and decodes to itself. The vocabulary is smaller than `vocab_size`
    if the texts contain too little to fill it.

    Training time grows with the square of the longest piece that the pattern does not split (DNA, Chinese without
    punctuation, a line of dashes). So, for training only, pieces are split after MAX_PIECE characters; `notes` of the
    result say how many.

    Args:
        texts: what to train on.
        vocab_size: ids, with the end-of-text token.
        file: what to write.
        kind: `bpe` is byte-pair encoding (arXiv:1508.07909) of bytes, as in GPT-2; `unigram` is a unigram language
            model (arXiv:1804.10959) of bytes.

    Raises:
        DataError: `unigram` needs a package that is not installed.
    """
    n_split = 0

    def count_while_reading() -> Iterator[str]:
        nonlocal n_split
        for text in texts:
            n_split += count_long_pieces(text)
            yield text

    train = _train_bpe if kind == "bpe" else _train_unigram
    model = train(count_while_reading(), vocab_size)
    config = make_tokenizer_config(
        {END_OF_TEXT: 0}, model, pre_tokenizer=byte_level(SPLIT_PATTERN), decoder=BYTE_LEVEL_DECODER
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode())
    runs = f"{n_split:,} unbroken run{'s' * (n_split != 1)} of more than {MAX_PIECE} characters"
    note = f"split for training the tokenizer, and only there: {runs}"
    return replace(load_tokenizer(file), notes=(note,) if n_split else ())


def count_long_pieces(text: str) -> int:
    """Return how many pieces of a text that SPLIT_PATTERN does not split are longer than MAX_PIECE characters."""
    if len(text) <= MAX_PIECE:
        return 0
    raw = np.frombuffer(text.encode(), np.uint8)
    white_space_edges = np.flatnonzero(np.diff(raw <= ord(" "), prepend=False, append=False))
    bounds = np.concatenate([[0], white_space_edges, [len(raw)]])
    runs = [raw[bounds[i] : bounds[i + 1]].tobytes().decode() for i in np.flatnonzero(np.diff(bounds) > MAX_PIECE)]
    return sum(len(piece) > MAX_PIECE for run in runs for piece in _PIECES.findall(run))


def _untrained_tokenizer() -> tokenizers.Tokenizer:
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    return tokenizers.Tokenizer.from_str(
        json.dumps(make_tokenizer_config({}, empty, pre_tokenizer=byte_level(SPLIT_PATTERN, MAX_PIECE)))
    )


def _train_bpe(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    backend = _untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    return model


def _train_unigram(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """Train with SentencePiece, on words counted here.

    The trainer of `tokenizers` is not deterministic, and its result is worse.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(f"data.tokenizer_kind=unigram: pip install 'pretrain[tokenizers]' ({error})") from None
    splitter = _untrained_tokenizer().pre_tokenizer
    counts = Counter(pre_tokenizers.ByteLevel.alphabet())
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{word}\t{count}" for word, count in sorted(counts.items())]),
        input_format="tsv",
        model_writer=trained,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        bos_id=-1,
        eos_id=-1,
        num_threads=16,  # fixed, because the order of the sums, and so the vocabulary, depends on it
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    scores = [[pieces.id_to_piece(i), pieces.get_score(i)] for i in range(1, len(pieces))]  # 0 is the unknown piece
    return {"type": "Unigram", "unk_id": None, "byte_fallback": False, "vocab": [[END_OF_TEXT, 0.0], *scores]}


def sample_texts(documents: Iterable[Document], max_bytes: float) -> list[str]:
    """Return a uniform sample of the documents' texts, of at most `max_bytes` of UTF-8, in one pass.

    Keeps the documents with the lowest hashes of their ids that fit, so position does not matter, and the same
    documents give the same sample. Holds at most `max_bytes` and one document in memory. A longer document is truncated
    to `max_bytes`.
    """
    kept: list[tuple[int, int, str, int]] = []  # a heap with the highest hash first: (-hash, -arrival, text, bytes)
    total = 0
    for arrival, document in enumerate(documents):
        text, size = document.text, document.n_bytes
        if size > max_bytes:
            text, size = text.encode()[: int(max_bytes)].decode(errors="ignore"), int(max_bytes)
        heapq.heappush(kept, (-document_hash(document.id, salt=1), -arrival, text, size))
        total += size
        while total > max_bytes:
            total -= heapq.heappop(kept)[3]
    return [text for _, _, text, _ in sorted(kept, reverse=True)]


def document_hash(name: str, salt: int) -> int:
    """Return a 64-bit hash of a document's id. Different salts give independent hashes."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed=salt)
