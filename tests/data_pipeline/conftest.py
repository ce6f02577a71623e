from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.prepare import StageProgressCallback, prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import MANIFEST, Recipe, SourceManifest, SplitManifest, TokenDtype
from data_pipeline.storage.prepared import PreparedData
from data_pipeline.storage.shard_writer import write_shard
from data_pipeline.storage.shards import OpenedSplit, open_split, token_dtype

WORDS = [
    "the",
    "a",
    "of",
    "model",
    "token",
    "shard",
    "loss",
    "data",
    "rank",
    "step",
    "mesh",
    "batch",
    "while",
    "return",
    "def",
]


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Write `documents` text files of random words to two folders."""
    rng = np.random.default_rng(seed)
    for i in range(documents):
        file = folder / ("a" if i % 2 else "b") / f"{i:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join(rng.choice(WORDS, size=int(rng.integers(5, 200)))) + f"\n{i}\n")
    return folder


@pytest.fixture
def make_corpus() -> Callable[..., Path]:
    return write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def prepare_at() -> Callable[..., PreparedData]:
    """Return a function that calls `prepare` with small settings; keywords override them."""

    def run(
        path: Path,
        folder: Path,
        *,
        keep_rejects: bool = False,
        progress: StageProgressCallback = lambda _: None,
        **settings: Any,
    ) -> PreparedData:
        defaults: dict[str, Any] = {
            "sources": [SourceConfig(kind="text", paths=(str(folder),))],
            "vocab_size": 300,
            "tokenizer_sample_mb": 1.0,
            "validation_fraction": 0.1,
            "shard_tokens": 1000,
            "workers": 1,
        }
        return prepare(path, PrepareConfig(**(defaults | settings)), keep_rejects=keep_rejects, progress=progress)

    return run


@pytest.fixture
def write_split(tmp_path: Path) -> Callable[..., OpenedSplit]:
    """Return a function that writes a split, given the documents of each source as token lists."""

    def write(
        documents: dict[str, list[list[int]]],
        vocab_size: int = 1000,
        shard_tokens: int = 50,
        eot_id: int = 0,
        name: str = "train",
    ) -> OpenedSplit:
        folder = tmp_path / "split" / name
        folder.mkdir(parents=True)
        recipe = Recipe(settings=PrepareConfig(), trained_tokenizer=False, listings=(), lists="", made_with={})
        sources = tuple(
            _write_source(folder, source, lists, token_dtype(vocab_size), shard_tokens)
            for source, lists in documents.items()
        )
        manifest = SplitManifest(
            split=name,
            splits=(name,),
            vocab_size=vocab_size,
            eot_id=eot_id,
            tokenizer="",
            recipe=recipe,
            sources=sources,
        )
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        return open_split(folder)

    return write


def _write_source(
    folder: Path, name: str, documents: list[list[int]], dtype: TokenDtype, shard_tokens: int
) -> SourceManifest:
    """Write shards `<name>-00000`, ... of at most `shard_tokens` tokens, or of one longer document."""
    shards: list[list[list[int]]] = []
    for ids in documents:
        if not shards or sum(map(len, shards[-1])) + len(ids) > shard_tokens:
            shards.append([])
        shards[-1].append(ids)
    return SourceManifest(
        name=name,
        documents=len(documents),
        tokens=sum(map(len, documents)),
        text_bytes=0,
        dtype=dtype,
        ends_with_eot=True,
        dropped={},
        repaired={},
        marked={},
        shards=tuple(
            write_shard(
                folder,
                f"{name}-{k:05d}",
                np.array(list(chain(*lists))),
                np.array(list(map(len, lists)), np.int32),
                dtype,
            )
            for k, lists in enumerate(shards)
        ),
    )


@pytest.fixture
def random_documents() -> Callable[..., list[list[int]]]:
    """Return a function that draws token lists of lengths 1 to `longest`. They end in 0 and may hold a 0 inside."""

    def draw(count: int, longest: int, seed: int = 0, vocab_size: int = 1000) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [[*rng.integers(0, vocab_size, rng.integers(0, longest)).tolist(), 0] for _ in range(count)]

    return draw
