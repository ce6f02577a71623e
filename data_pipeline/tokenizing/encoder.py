"""Text -> token ids at speed: the fastest back end that gives the ids of the reference, which is `tokenizers`.

An encoder belongs to one process and uses one core: those who prepare data run one in each of their worker processes.
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
"""Texts that tokenizers like to disagree on. Those of each tokenizer's own added tokens come on top."""

_CACHE_BYTES = 512 << 20


class Encoder(Protocol):
    """Turns texts into ids, without any beginning or end token. A special token written out in a text is text."""

    @property
    def name(self) -> str:
        """The library that does it."""

    @property
    def failures(self) -> int:
        """Batches that it broke on, which the reference encoded."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """(ids of all texts in a row, offsets [n + 1]): the ids of text i are `ids[offsets[i]:offsets[i + 1]]`."""


class ReferenceEncoder:
    """What the ids are by definition: the library `tokenizers`. Set TOKENIZERS_PARALLELISM=false to keep it on one core."""

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
    """The library `gigatoken`, for the tokenizers it knows.

    It remembers every piece of text that it has seen, which took 75 MB after 250 MB of Python sources and 10 GB after 1 GB of
    random words. So it starts afresh when the process has grown by half a gigabyte inside it, and after a panic.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises GigaFailedError where the library is missing or cannot do this tokenizer."""
        self._config = _without_special_tokens(json.loads(tokenizer.to_json()))
        self._reference = ReferenceEncoder(tokenizer)
        self._backend = self._load()
        self._grown = 0
        self.failures = 0
        """Batches that the library broke on; the reference encoded them."""

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
            self._backend, self._grown = self._load(), 0  # a panic may have left anything behind
            return self._reference.encode(texts)
        # Where the system does not tell (no /proc), 9 bytes for each of text: what a text of words never seen before takes.
        self._grown += max(0, _resident_bytes() - before - ids.nbytes) if before else 9 * sum(map(len, texts))
        if self._grown > _CACHE_BYTES:
            self._backend, self._grown = self._load(), 0
        return ids, offsets

    def try_encode(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """As `encode`, but raises GigaFailedError where the library breaks."""
        with _failing("broke on a text"):
            rows = self._backend.encode_batch(list(texts), parallel=False).layout
            return np.asarray(rows.content.data), np.asarray(rows.offsets.data)


class GigaFailedError(Exception):
    """Why gigatoken cannot be used."""


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in gigatoken, panics of its Rust code too (they are no `Exception`), into GigaFailedError."""
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
    """(encoder, why this one): gigatoken where its ids are those of the reference on `sample` and on strings known to be hard.

    Gigatoken is loaded, and checked on the hard strings, once a process; so a check on another sample costs little more than
    the reference takes for it.
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
    """(gigatoken, the hard strings that it agrees on), or (None, what is wrong with it)."""
    if (
        not tokenizer.coverage.is_complete
    ):  # it may load it, and then differ where a byte is missing that no string here has
        return None, "gigatoken works on bytes, and not every byte has a token"
    hard = [*HARD_STRINGS, *hard_strings_for(json.loads(tokenizer.to_json()))]
    try:
        giga = GigaEncoder(tokenizer)
        _check_ids(giga, ReferenceEncoder(tokenizer), hard)
    except GigaFailedError as error:
        return None, str(error)
    return giga, f"{len(hard):,} hard ones"


def _check_ids(giga: GigaEncoder, reference: ReferenceEncoder, texts: Sequence[str]) -> None:
    ids, offsets = giga.try_encode(texts)
    expected, bounds = reference.encode(texts)
    if np.array_equal(bounds, offsets) and np.array_equal(expected, ids):
        return
    rows = zip(texts, pairwise(bounds), pairwise(offsets), strict=True)
    wrong = next(text for text, here, there in rows if not np.array_equal(expected[slice(*here)], ids[slice(*there)]))
    raise GigaFailedError(f"gigatoken gives other ids, first for {wrong[:60]!r}")


def hard_strings_for(config: Mapping[str, Any]) -> list[str]:
    """Texts with the added tokens of a tokenizer: alone, inside words, cut short, and each special one overlapping another token.

    As many as the tokens have characters, at most, and six for each token.
    """
    names = [token["content"] for token in config.get("added_tokens", ())]
    special = {token["content"] for token in config.get("added_tokens", ()) if token["special"]}
    texts = [form for name in names for form in (name, f"a{name}b", f" {name} {name}\n", name[:-1], name[1:], name * 2)]
    # The reference finds a special token, leaves it as text and goes on behind it; so what begins inside one is not found.
    # One text for each end of a token with which others begin: all pairs would be the square of them.
    beginning = dict[tuple[str, bool], str]()
    for name in names:
        for n in range(1, len(name)):
            beginning.setdefault((name[:n], name in special), name)
    for first in names:
        for n in range(1, len(first)):
            second = beginning.get((first[-n:], first not in special))
            if second is not None:
                texts.append(first + second[n:])
    return texts


def _without_special_tokens(config: dict[str, Any]) -> str:
    """The tokenizer for gigatoken, which would find special tokens in a text: none is left to find, nor anything to cut or to add."""
    added = [token for token in config.get("added_tokens", ()) if not token["special"]]
    return json.dumps(config | {"added_tokens": added, "truncation": None, "padding": None, "post_processor": None})


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
