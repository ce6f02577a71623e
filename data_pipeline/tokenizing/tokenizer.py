"""The tokenizer: training one over bytes, loading one of any format, and turning text into ids and back."""

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
"""What the tokenizers of GPT, Qwen, Llama 3, Llama 2 and Mistral, Gemma, DeepSeek and others call the end of a document."""

MAX_PIECE = 512
"""Characters of the longest piece of text that a trainer gets. SentencePiece skips lines of more than 4,192 bytes: as bytes spelt in
printable characters 512 characters are 4,096 at most."""

_PIECES = re.compile(r"[^\W\d_]+|(?:[^\w\s]|_)+|\s+")
"""Letters, marks, white space: about what SPLIT does not split; digits go in threes."""


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. Special tokens written out in a text are text: ids of special tokens are only ever added by id."""

    backend: tokenizers.Tokenizer
    vocab_size: int
    """Highest id + 1."""
    eot_id: int
    """Id of the end-of-text token, which follows every document."""
    fingerprint: str
    """xxh3-128 of the canonical JSON, of `tokenizer.json` or of what another format was made into."""
    coverage: Coverage
    """Which texts it knows."""
    _json: str = field(repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What whoever trained it should know, a line each."""

    def to_json(self) -> str:
        """The contents of a `tokenizer.json` that loads as this very tokenizer, whatever it was loaded from."""
        return self._json

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any beginning or end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without any beginning or end token; uses all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelt out; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, a file of tiktoken ranks, a SentencePiece model, or the one of these that is in a folder.

    Raises:
        DataError: it is missing, broken or unknown, or it has no end-of-text token that we know.
    """
    file, config = read_tokenizer_config(path)
    backend = build_backend(config, file)
    if within_reach := _within_reach(config, backend):
        config = split_special_tokens(config, within_reach)
        backend = build_backend(config, file)
    special = {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    end = next((name for name in KNOWN_END_TOKENS if name in special), None)
    if end is None:
        raise DataError(
            f"data.tokenizer: {file} has no end-of-text token among its special tokens ({', '.join(special) or 'none'}); "
            f"it must be one of {', '.join(KNOWN_END_TOKENS)} among the added_tokens of a tokenizer.json"
        )
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    text = json.dumps(config, ensure_ascii=False, separators=(",", ":")) + "\n"
    return Tokenizer(
        backend, vocab_size, special[end], xxhash.xxh3_128_hexdigest(canonical), analyze_coverage(config), text
    )


def build_backend(config: Mapping[str, Any], file: Path | str) -> tokenizers.Tokenizer:
    """The tokenizer of the contents of a `tokenizer.json`; `file` is what an error calls it."""
    try:
        backend = tokenizers.Tokenizer.from_buffer(json.dumps(config, ensure_ascii=False).encode())
    except ValueError as error:
        raise DataError(f"data.tokenizer: {file} is not a tokenizer.json: {error}") from error
    # Files from the hub may cut texts at some length; what is cut off would be lost without a word.
    backend.no_truncation()
    backend.no_padding()
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None  # else the same text would have other ids every time
    backend.encode_special_tokens = True
    return backend


def _within_reach(config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> set[str]:
    """Special tokens that the model itself would make of a text that spells them out.

    They are in its vocabulary, nothing cuts them before it sees them, and either it takes every entry for a piece of text (all
    but BPE do), or it takes whole words as they are, or some merge makes them.
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
    cut = backend.pre_tokenizer
    return {name for name in special if cut is None or any(name in piece for piece, _ in cut.pre_tokenize_str(name))}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, file: Path, kind: Literal["bpe", "unigram"] = "bpe"
) -> Tokenizer:
    """Train a tokenizer over bytes and write it to `file`, whole or not at all.

    `bpe` is byte-pair encoding (arXiv:1508.07909, on bytes as GPT-2 does), `unigram` a unigram language model of the same bytes
    (arXiv:1804.10959). Every byte has an id, so no text is ever unknown and each comes back as it was. The same texts give the
    same file. The vocabulary is smaller than `vocab_size` where the texts hold too little to fill it.

    The trainer's time grows with the square of the longest piece of text that no rule splits (DNA, Chinese without punctuation, a line
    of dashes). So pieces are cut after MAX_PIECE characters, for the training only; `notes` of the result say how many were.

    Raises:
        DataError: `unigram` needs a package that is not installed.
    """
    n_cut = 0

    def counted() -> Iterator[str]:
        nonlocal n_cut
        for text in texts:
            n_cut += count_long_pieces(text)
            yield text

    model = _train_bpe(counted(), vocab_size) if kind == "bpe" else _train_unigram(counted(), vocab_size)
    config = make_tokenizer_config(
        {END_OF_TEXT: 0}, model, pre_tokenizer=byte_level(SPLIT_PATTERN), decoder=BYTE_LEVEL_DECODER
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode())
    runs = f"{n_cut:,} unbroken run{'s' * (n_cut != 1)} of more than {MAX_PIECE} characters"
    cut = f"cut for the training of the tokenizer, and only there: {runs}"
    return replace(load_tokenizer(file), notes=(cut,) if n_cut else ())


def count_long_pieces(text: str) -> int:
    """How many pieces of `text` the trainer would get uncut that are longer than MAX_PIECE characters."""
    if len(text) <= MAX_PIECE:
        return 0
    raw = np.frombuffer(text.encode(), np.uint8)
    edges = np.flatnonzero(
        np.diff(raw <= ord(" "), prepend=False, append=False)
    )  # where runs of white space begin and end
    bounds = np.concatenate([[0], edges, [len(raw)]])
    runs = [raw[bounds[i] : bounds[i + 1]].tobytes().decode() for i in np.flatnonzero(np.diff(bounds) > MAX_PIECE)]
    return sum(len(piece) > MAX_PIECE for run in runs for piece in _PIECES.findall(run))


def _untrained() -> tokenizers.Tokenizer:
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    return tokenizers.Tokenizer.from_str(
        json.dumps(make_tokenizer_config({}, empty, pre_tokenizer=byte_level(SPLIT_PATTERN, MAX_PIECE)))
    )


def _train_bpe(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    backend = _untrained()
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
    """By SentencePiece, on words counted here. The trainer of `tokenizers` gives another vocabulary at every run, and a worse one."""
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(f"data.tokenizer_kind=unigram: pip install 'pretrain[tokenizers]' ({error})") from None
    words = _untrained().pre_tokenizer
    counts = Counter(pre_tokenizers.ByteLevel.alphabet())
    for text in texts:
        counts.update(word for word, _ in words.pre_tokenize_str(text))
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
        num_threads=16,  # the sums, and so the vocabulary, depend on it: never the number of cores
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    scores = [[pieces.id_to_piece(i), pieces.get_score(i)] for i in range(1, len(pieces))]  # 0 is its unknown piece
    return {"type": "Unigram", "unk_id": None, "byte_fallback": False, "vocab": [[END_OF_TEXT, 0.0], *scores]}


def sample_texts(documents: Iterable[Document], max_bytes: float) -> list[str]:
    """An even sample of the documents' texts, `max_bytes` of UTF-8 at most, in one pass.

    Documents are ranked by the hash of their id and the first ones that fit are kept, so every document has the same chance
    wherever it stands, and the same documents give the same sample. Holds no more than `max_bytes` and one document; a longer
    document is cut to that.
    """
    kept: list[tuple[int, int, str, int]] = []  # a heap whose first is the worst rank: (-hash, -arrival, text, bytes)
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
    """A 64-bit hash of a document's id; different salts give independent choices."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"), seed=salt)
