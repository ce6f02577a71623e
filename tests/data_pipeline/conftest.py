from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.manifest import MANIFEST, Manifest, Recipe
from data_pipeline.settings import SourceConfig
from data_pipeline.shards import ShardSet, ShardWriter, token_dtype
from data_pipeline.tokenize import Prepared, prepare

WORDS = ["the", "a", "of", "model", "token", "shard", "loss", "data", "rank", "step", "mesh", "batch", "while", "return", "def"]


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """`documents` text files of random words in two folders."""
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
def prepare_at() -> Callable[..., Prepared]:
    """`prepare` with small settings; keywords override them."""

    def run(path: Path, folder: Path, **settings: Any) -> Prepared:
        defaults: dict[str, Any] = {
            "sources": [SourceConfig(kind="text", paths=(str(folder),))],
            "tokenizer": None,
            "vocab_size": 300,
            "tokenizer_sample_mb": 1.0,
            "validation_fraction": 0.1,
            "shard_tokens": 1000,
        }
        return prepare(path=path, **(defaults | settings))

    return run


@pytest.fixture
def write_split(tmp_path: Path) -> Callable[..., ShardSet]:
    """A split of documents given as token lists."""

    def write(documents: list[list[int]], vocab_size: int = 1000, shard_tokens: int = 50, eot_id: int = 0, name: str = "train") -> ShardSet:
        folder = tmp_path / "split" / name
        dtype = token_dtype(vocab_size)
        writer = ShardWriter(folder, dtype, shard_tokens)
        for ids in documents:
            writer.add(np.array(ids, dtype))
        recipe = Recipe(sources=(), listings=(), trained_tokenizer=None, validation_fraction=0, shard_tokens=shard_tokens, made_with={})
        manifest = Manifest(
            split=name,
            documents=len(documents),
            tokens=sum(map(len, documents)),
            text_bytes=0,
            dtype=dtype,
            vocab_size=vocab_size,
            eot_id=eot_id,
            tokenizer="",
            dropped={},
            repaired={},
            recipe=recipe,
            shards=writer.finish(),
        )
        (folder / MANIFEST).write_bytes(manifest.to_bytes())
        return ShardSet.open(folder)

    return write


@pytest.fixture
def random_documents() -> Callable[..., list[list[int]]]:
    """Token lists that end in 0 and may hold a 0 inside, of lengths 1 to `longest`."""

    def draw(count: int, longest: int, seed: int = 0, vocab_size: int = 1000) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [[*rng.integers(0, vocab_size, rng.integers(0, longest)).tolist(), 0] for _ in range(count)]

    return draw
