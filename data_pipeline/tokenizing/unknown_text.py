"""Count, for every document, what the tokenizer could not represent: unknown tokens, and characters that vanished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from data_pipeline.tokenizing.coverage import pipeline_steps
from data_pipeline.tokenizing.tokenizer import Tokenizer, build_backend

_LOST_TOKEN, _LOST_ID = "\0lost", 2**32 - 1


@dataclass(frozen=True)
class UnknownCounts:
    """What the tokenizer could not represent of some documents; arrays [documents]."""

    unknown: NDArray[np.int64]
    """Unknown tokens."""
    lost: NDArray[np.int64]
    """Characters that vanished, entirely or in part."""


class UnknownTextCounter:
    """Counts what a tokenizer cannot represent, from texts and their ids, whichever encoder made the ids.

    It costs nothing if every character has ids, and one comparison for each id if there is an unknown token. Only if
    unknown characters vanish are documents encoded twice, and only those with characters that may vanish.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.coverage = tokenizer.coverage
        self._unk_tokenizer = None
        self._is_context_free = False
        """Whether a character vanishes does not depend on its neighbors."""
        if self.coverage.is_lossy and self.coverage.drops_unknown:
            config = json.loads(tokenizer.to_json())
            model = config["model"]
            self._unk_tokenizer = _add_unknown_token(config)
            has_affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
            normalizers = {step.get("type") for step in pipeline_steps(config, "normalizer")}
            self._is_context_free = not has_affixes and normalizers <= {"ByteLevel"}
        self._known_characters, self._lost_characters = set[str](), set[str]()

    def count(self, texts: Sequence[str], ids: NDArray[np.uint32], offsets: NDArray[np.int64]) -> UnknownCounts:
        """Count the unknown tokens and lost characters of each text.

        Args:
            texts: of the documents, [n].
            ids: of all documents, concatenated, without end-of-text tokens.
            offsets: [n + 1], as `Encoder.encode` returns them.
        """
        unknown, lost = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        if not self.coverage.is_complete and self.coverage.unknown_id is not None:
            hits = np.flatnonzero(ids == self.coverage.unknown_id)
            unknown += np.bincount(np.searchsorted(offsets, hits, side="right") - 1, minlength=len(texts))
        if self._unk_tokenizer is not None:
            suspects = [i for i, text in enumerate(texts) if self._may_lose(text)]
            encodings = self._unk_tokenizer.encode_batch([texts[i] for i in suspects], add_special_tokens=False)
            for i, encoding in zip(suspects, encodings, strict=True):
                pairs = zip(encoding.ids, encoding.offsets, strict=True)
                # Distinct spans, because several lost bytes may belong to one character.
                lost[i] = len({span for token_id, span in pairs if token_id == _LOST_ID})
        return UnknownCounts(unknown, lost)

    def _may_lose(self, text: str) -> bool:
        """Return whether characters of the text vanish; True if that depends on their neighbors."""
        if not self._is_context_free or self._unk_tokenizer is None:
            return True
        characters = set(text)
        for new in characters - self._known_characters - self._lost_characters:
            is_lost = _LOST_ID in self._unk_tokenizer.encode(new, add_special_tokens=False).ids
            (self._lost_characters if is_lost else self._known_characters).add(new)
        return not self._lost_characters.isdisjoint(characters)


def _add_unknown_token(config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build the same tokenizer with an unknown token for every character that the original drops."""
    model = config["model"]
    changed = {**model, "vocab": {**model["vocab"], _LOST_TOKEN: _LOST_ID}, "unk_token": _LOST_TOKEN, "fuse_unk": False}
    return build_backend({**config, "model": changed}, "tokenizer.json")
