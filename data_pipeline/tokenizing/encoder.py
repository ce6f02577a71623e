"""Encode text fast: with `gigatoken` where it gives the same ids as the reference library, `tokenizers`.

An encoder belongs to one process and uses one core. A preparation runs one in each worker process.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizing.tokenizer import Tokenizer

if TYPE_CHECKING:
    import gigatoken

HARD_STRINGS = (
    "",
    " ",
    "  leading and trailing  ",
    "\t\tif x:\r\n\r\n    y\n \n  z\n   ",
    "\x00",
    "a\x00b\x01\x02\x1b[0m\x7f\x80\x85\x9f",
    "It's WE'LL they'Re I'ſt 'S\u2019s",
    "0 12 123 1234567890 1,234.5e-6 ٣٤ ² Ⅷ",
    "HTMLParser camelCase snake_case __dunder__ ALLCAPS Ⅻ Dž dž İı ß ẞ ﬁ",
    "e\u0301 n\u0303o \u0301alone Z\u0351\u034a\u0327 \u0928\u093f \uac01\u1100\u1161\u11a8",
    "漢字かなカナ한국어，。「」\u3000全角ＡＢＣ１２３",
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪 ❤\ufe0f 👍🏽 \U0001f9d1\u200d\U0001f680",
    "\u202bשלום עולם\u202c مرحبا بالعالم \u200f(a)\u200e",
    "ไทยไม่มีช่องว่าง ខ្មែរ မြန်မာ Ελληνικά Кириллица",
    "\u00a0nbsp\u2003em\u2028line\u2029paragraph\u200bzero\ufeffbom\u00adsoft",
    "\ufffd\ufffe\uffff\U0010ffff\ue000\U000e0041",
    "<unk> <s> </s> <pad> <0x41> <0xFF> [CLS] <|im_start|> <|endoftext|>",
    "▁▁ ▁ Ġ Ċ ĉ ##ing @@ Ã©",
    "==== ---- //// **** #### !!!???... <<>>[]{}()\\\\ `~ $100 50% a@b.c https://x.y/z?q=1&r=#f",
    *(character * length for character in " \n\t\u3000a0=é字🎉" for length in (2, 3, 7, 33, 1000)),
    "ab" * 500,
    " \n" * 200 + "x",
)
"""Texts on which tokenizer libraries tend to disagree. `hard_strings_for` adds texts with a tokenizer's own added
tokens."""

_CACHE_BYTES = 512 << 20


class Encoder(Protocol):
    """Turns texts into ids, without beginning or end tokens.

    A special token that a text spells out is encoded as text.
    """

    @property
    def name(self) -> str:
        """The library used."""

    @property
    def failures(self) -> int:
        """Batches on which the library failed, and which the reference encoded instead."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return (concatenated ids, offsets [n + 1]): the ids of text i are `ids[offsets[i]:offsets[i + 1]]`."""


class ReferenceEncoder:
    """The library `tokenizers`, whose ids are correct by definition.

    TOKENIZERS_PARALLELISM=false keeps it on one core.
    """

    name = "tokenizers"
    failures = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See `Encoder`."""
        rows = [
            np.array(encoding.ids, np.uint32)
            for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return np.concatenate([np.zeros(0, np.uint32), *rows]), offsets


class GigaEncoder:
    """The library `gigatoken`, for the tokenizers that it supports.

    It caches every piece of text that it has seen: 75 MB after 250 MB of Python sources, 10 GB after 1 GB of random
    words. So it is loaded anew when its calls have grown the process by half a gigabyte, and after a panic.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Load the library. Raises GigaFailedError if it is missing or does not support this tokenizer."""
        self._config = _without_special_tokens(json.loads(tokenizer.to_json()))
        self._reference = ReferenceEncoder(tokenizer)
        self._backend = self._load()
        self._grown = 0
        self.failures = 0
        """Batches on which the library failed, and which the reference encoded instead."""

    def _load(self) -> gigatoken.Tokenizer:
        with _failing("cannot load this tokenizer"):
            import gigatoken

            return gigatoken.Tokenizer.from_json(self._config)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """See `Encoder`."""
        before = _resident_bytes()
        try:
            ids, offsets = self.try_encode(texts)
        except GigaFailedError:
            self.failures += 1
            self._backend, self._grown = self._load(), 0  # a panic may have left it in any state
            return self._reference.encode(texts)
        # Without /proc, assume 9 bytes for each character: the growth for a text of words never seen before.
        self._grown += max(0, _resident_bytes() - before - ids.nbytes) if before else 9 * sum(map(len, texts))
        if self._grown > _CACHE_BYTES:
            self._backend, self._grown = self._load(), 0
        return ids, offsets

    def try_encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Encode like `encode`, but raise GigaFailedError if the library fails."""
        with _failing("broke on a text"):
            rows = self._backend.encode_batch(list(texts), parallel=False).layout
            return np.asarray(rows.content.data), np.asarray(rows.offsets.data)


class GigaFailedError(Exception):
    """gigatoken is missing, does not support a tokenizer, failed, or gave wrong ids."""


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn any error in gigatoken into GigaFailedError, also panics of its Rust code, which are not `Exception`s."""
    try:
        yield
    except ImportError as error:
        raise GigaFailedError(f"gigatoken is not installed ({error})") from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GigaFailedError(f"gigatoken {what} ({lines[0][:200]})") from None


def select_encoder(tokenizer: Tokenizer, sample: Sequence[str]) -> tuple[Encoder, str]:
    """Return (encoder, reason): gigatoken if its ids are right on `sample` and HARD_STRINGS, else the reference.

    gigatoken is loaded, and checked on the hard strings, once a process. Checking another sample then costs little more
    than encoding it with the reference.
    """
    reference = ReferenceEncoder(tokenizer)
    giga, found = _checked_giga(tokenizer)
    if giga is None:
        return reference, f"tokenizers: {found}"
    try:
        _check_ids(giga, reference, sample)
    except GigaFailedError as error:
        return reference, f"tokenizers: {error}"
    return giga, f"gigatoken: its ids are those of tokenizers on {len(sample):,} texts of the data and {found}"


@functools.lru_cache(maxsize=1)
def _checked_giga(tokenizer: Tokenizer) -> tuple[GigaEncoder | None, str]:
    """Return (gigatoken, how many hard strings it agrees on), or (None, what is wrong with it)."""
    # gigatoken may load such a tokenizer, and then differ on a missing byte that no hard string has.
    if not tokenizer.coverage.is_complete:
        return None, "gigatoken works on bytes, and not every byte has a token"
    hard = [*HARD_STRINGS, *hard_strings_for(json.loads(tokenizer.to_json()))]
    try:
        giga = GigaEncoder(tokenizer)
        _check_ids(giga, ReferenceEncoder(tokenizer), hard)
    except GigaFailedError as error:
        return None, str(error)
    return giga, f"{len(hard):,} hard ones"


def _check_ids(giga: GigaEncoder, reference: ReferenceEncoder, texts: Sequence[str]) -> None:
    """Raise GigaFailedError if the ids of any text differ."""
    ids, offsets = giga.try_encode(texts)
    expected, expected_offsets = reference.encode(texts)
    if np.array_equal(expected_offsets, offsets) and np.array_equal(expected, ids):
        return
    rows = zip(texts, pairwise(expected_offsets), pairwise(offsets), strict=True)
    wrong = next(text for text, ours, theirs in rows if not np.array_equal(expected[slice(*ours)], ids[slice(*theirs)]))
    raise GigaFailedError(f"gigatoken gives other ids, first for {wrong[:60]!r}")


def hard_strings_for(config: Mapping[str, Any]) -> list[str]:
    """Return texts with a tokenizer's added tokens: alone, inside words, truncated, overlapping with others.

    At most six texts for each token, and one for each character of the tokens.
    """
    names = [token["content"] for token in config.get("added_tokens", ())]
    special = {token["content"] for token in config.get("added_tokens", ()) if token["special"]}
    texts = [form for name in names for form in (name, f"a{name}b", f" {name} {name}\n", name[:-1], name[1:], name * 2)]
    # The reference matches a special token, leaves it as text and continues after it, so it misses a token that begins
    # inside. One text for each suffix of a token that is a prefix of some other token: all pairs would be too many.
    token_with_prefix = dict[tuple[str, bool], str]()
    for name in names:
        for n in range(1, len(name)):
            token_with_prefix.setdefault((name[:n], name in special), name)
    for first in names:
        for n in range(1, len(first)):
            second = token_with_prefix.get((first[-n:], first not in special))
            if second is not None:
                texts.append(first + second[n:])
    return texts


def _without_special_tokens(config: dict[str, Any]) -> str:
    """Return the tokenizer's JSON without truncation and special tokens, which gigatoken would match in texts."""
    added = [token for token in config.get("added_tokens", ()) if not token["special"]]
    return json.dumps(config | {"added_tokens": added, "truncation": None, "padding": None, "post_processor": None})


def _resident_bytes() -> int:
    """Return the resident memory of this process; 0 if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
