"""How much of its texts a tokenizer did not know: unknown tokens, and characters that vanished. Counted for every document."""

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
    """What a tokenizer did not know of some documents; arrays [documents]."""

    unknown: NDArray[np.int64]
    """Unknown tokens."""
    lost: NDArray[np.int64]
    """Characters that vanished, as a whole or in part."""


class UnknownTextCounter:
    """Counts what a tokenizer does not know of the documents it encodes, from their texts and ids: whoever encoded them.

    It costs nothing where every character has ids, and a comparison of each id where an unknown token stands for the others.
    Only a tokenizer that loses characters has to encode documents twice, those with characters that it may lose.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.coverage = tokenizer.coverage
        self._twin = None
        self._alone = False
        """A character is lost wherever it stands or nowhere."""
        if self.coverage.is_lossy and self.coverage.drops_unknown:
            config = json.loads(tokenizer.to_json())
            model = config["model"]
            self._twin = _twin(config)
            affixed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
            self._alone = not affixed and all(
                step.get("type") == "ByteLevel" for step in pipeline_steps(config, "normalizer")
            )
        self._known, self._lost = set[str](), set[str]()

    def count(self, texts: Sequence[str], ids: NDArray[np.uint32], offsets: NDArray[np.int64]) -> UnknownCounts:
        """What was not known of each text.

        Args:
            texts: of the documents, [n].
            ids: of all documents in a row, without end-of-text tokens.
            offsets: [n + 1], as `Encoder.encode` returns them.
        """
        unknown, lost = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
        if not self.coverage.is_complete and self.coverage.unknown_id is not None:
            hits = np.flatnonzero(ids == self.coverage.unknown_id)
            unknown += np.bincount(np.searchsorted(offsets, hits, side="right") - 1, minlength=len(texts))
        if self._twin is not None:
            suspects = [i for i, text in enumerate(texts) if self._may_lose(text)]
            for i, encoding in zip(
                suspects, self._twin.encode_batch([texts[i] for i in suspects], add_special_tokens=False), strict=True
            ):
                pairs = zip(encoding.ids, encoding.offsets, strict=True)
                lost[i] = len(
                    {place for number, place in pairs if number == _LOST_ID}
                )  # several bytes may be of one character
        return UnknownCounts(unknown, lost)

    def _may_lose(self, text: str) -> bool:
        """Whether the text has characters that are lost; True where that depends on their neighbours."""
        if not self._alone or self._twin is None:
            return True
        characters = set(text)
        for new in characters - self._known - self._lost:
            found = _LOST_ID in self._twin.encode(new, add_special_tokens=False).ids
            (self._lost if found else self._known).add(new)
        return not self._lost.isdisjoint(characters)


def _twin(config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The same tokenizer, but that a token of its own stands for every character that the original drops."""
    model = config["model"]
    changed = {**model, "vocab": {**model["vocab"], _LOST_TOKEN: _LOST_ID}, "unk_token": _LOST_TOKEN, "fuse_unk": False}
    return build_backend({**config, "model": changed}, "tokenizer.json")
