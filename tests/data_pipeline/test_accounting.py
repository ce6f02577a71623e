"""Nothing is lost: every document is written or dropped for a reason, and an epoch reads every token once."""

import importlib.metadata
import io
import json
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from numpy.typing import NDArray

from data_pipeline.reading.loader import Loader
from data_pipeline.reading.packing import NO_LABEL
from data_pipeline.settings import MixtureConfig
from data_pipeline.storage.manifest import DTYPES, SPLITS, SplitManifest, load_manifest

SEQ_LEN = 256
PACKAGES = ("rich", "fsspec", "typer", "yaml")
"""Dependencies whose Python sources are the text."""


def sources_below(folder: Path, most_bytes: int) -> list[str]:
    """Return Python sources in the order of their names, up to a total size."""
    texts: list[str] = []
    for file in sorted(folder.rglob("*.py")):
        text = file.read_text(errors="replace")
        most_bytes -= len(text)
        if most_bytes < 0:
            break
        texts.append(text)
    return texts


def write_jsonl_zst(file: Path, rows: Iterable[dict[str, str]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


@dataclass(frozen=True)
class Prepared:
    """The result of one command for the three sources."""

    path: Path
    documents: dict[str, int]
    """Documents of each source, counted in its raw files."""
    out: str


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    raw, path = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("mixture") / "data"
    stdlib, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    library = [
        text for name in ("json", "email", "asyncio", "unittest") for text in sources_below(stdlib / name, 300_000)
    ]
    (raw / "library").mkdir()
    for number in range(3):  # the first file alone is larger than a chunk
        texts = library[number::3]
        write_jsonl_zst(
            raw / "library" / f"{number}.jsonl.zst", ({"content": text, "path": str(i)} for i, text in enumerate(texts))
        )

    packages = [text for name in PACKAGES for text in sources_below(site / name, 200_000)]
    packages += [library[3].upper(), library[5] + "\n# one line more\n"]  # duplicates of the other source
    packages += [packages[2], "x = 1\n", ""]
    (raw / "packages").mkdir()
    for number in range(2):
        pq.write_table(
            pa.table({"text": packages[number::2]}), raw / "packages" / f"{number}.parquet", row_group_size=20
        )

    (raw / "docs").mkdir()
    metadata = [distribution.read_text("METADATA") or "" for distribution in importlib.metadata.distributions()]
    files = [
        file for kind in ("LICENSE*", "*.rst", "*.md", "*.txt") for file in sorted(site.rglob(kind)) if file.is_file()
    ]
    texts = [
        text
        for text in (*sorted(metadata), *(file.read_text(errors="replace") for file in files))
        if 100 < len(text) < 8000
    ]
    for number, text in enumerate([*texts[:20], *texts[-60:]]):
        (raw / "docs" / f"{number}.md").write_text(text, errors="replace")
    (raw / "docs" / "empty.txt").write_text(" \n")
    (raw / "docs" / "latin.txt").write_bytes(b"caf\xe9")

    config = {
        "path": str(path),
        "sources": [
            {
                "kind": "jsonl",
                "paths": [str(raw / "library")],
                "text_field": "content",
                "id_field": "path",
                "filters": ["length"],
            },
            {"kind": "parquet", "paths": [str(raw / "packages")], "filters": ["length"]},
            {"kind": "text", "paths": [str(raw / "docs")]},
        ],
        "filters": {
            "apply": ["length", "gopher_quality", "c4"],
            "length": {"min_characters": 20},
            "gopher_quality": {"max_non_alpha_words_ratio": 0.6},
            "c4": {"filter_no_terminal_punct": False},
        },
        "dedup": {"exact": True, "minhash": True},
        "vocab_size": 1000,
        "shard_tokens": 30_000,
        "validation_fraction": 0.05,
        "workers": 1,
    }
    (raw / "mixture.yaml").write_text(yaml.safe_dump({"data": config}))
    with pytest.MonkeyPatch.context() as patch:
        out = io.StringIO()
        patch.setattr("sys.argv", ["pretrain", "data", "prepare", str(raw / "mixture.yaml"), "--keep-rejects"])
        patch.setattr("sys.stdout", out)
        patch.setenv("COLUMNS", "200")
        from pretrain.cli import main

        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
    counts = {
        "library": sum(count_lines(file) for file in (raw / "library").iterdir()),
        "packages": sum(pq.ParquetFile(file).metadata.num_rows for file in (raw / "packages").iterdir()),
        "docs": len(list((raw / "docs").iterdir())),
    }
    return Prepared(path, counts, out.getvalue())


def count_lines(file: Path) -> int:
    return len(zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read().splitlines())


def manifests(path: Path) -> dict[str, SplitManifest]:
    return {split: load_manifest(path / split) for split in SPLITS}


def test_every_document_is_written_or_dropped_for_a_reason(prepared: Prepared) -> None:
    written, dropped = Counter[str](), Counter[tuple[str, str]]()
    for manifest in manifests(prepared.path).values():
        assert [source.name for source in manifest.sources] == ["library", "packages", "docs"]
        for source in manifest.sources:
            assert source.read == source.documents + sum(source.dropped.values())
            assert source.documents == sum(shard.documents for shard in source.shards)
            written[source.name] += source.documents
            dropped.update({(source.name, reason): count for reason, count in source.dropped.items()})
    for name, n_read in prepared.documents.items():
        assert n_read == written[name] + sum(count for (source, _), count in dropped.items() if source == name)
        assert written[name] > 10
    assert sum(prepared.documents.values()) == written.total() + dropped.total()
    assert dropped["packages", "exact_duplicate: library"] == 1
    assert dropped["packages", "near_duplicate: library"] == 1
    assert dropped["packages", "exact_duplicate: packages"] >= 1
    assert dropped["packages", "length: too short"] >= 1
    assert dropped["packages", "empty"] >= 1
    assert dropped["docs", "empty"] == 1
    for rule in ("gopher_quality", "c4"):
        assert any(reason.startswith(rule) for source, reason in dropped if source == "docs")
        assert not any(reason.startswith(rule) for source, reason in dropped if source != "docs")


def test_every_dropped_document_is_among_the_rejects_with_its_reason(prepared: Prepared) -> None:
    counted, found = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for manifest in manifests(prepared.path).values():
        for source in manifest.sources:
            counted.update({(source.name, reason): count for reason, count in source.dropped.items()})
    for file in (prepared.path / "rejects").iterdir():
        lines = zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read().splitlines()
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        found.update((row["source"], row["reason"]) for row in rows)
        assert all(file.name.startswith(row["source"]) for row in rows)
    assert found == counted


def test_the_command_prints_the_counts(prepared: Prepared) -> None:
    for name, documents in prepared.documents.items():
        counts_shown = [
            int(line.split()[1].replace(",", "")) for line in prepared.out.splitlines() if line.split()[:1] == [name]
        ]
        assert sum(counts_shown) == documents
        assert len(counts_shown) == 2


def real_tokens(loader: Loader, samples: int) -> NDArray[np.int64]:
    """Count how often each token is an input of the first samples, without padding. The last token of a stream has no
    label."""
    counts = np.zeros(loader.manifest.vocab_size, np.int64)
    for first in range(0, samples, 7):
        batch = loader.batch(first, min(7, samples - first))
        labels = (batch.labels != NO_LABEL).sum(axis=1)
        inside = np.arange(SEQ_LEN) < np.where(labels == SEQ_LEN, SEQ_LEN, labels + 1)[:, None]
        counts += np.bincount(batch.input_ids[inside], minlength=len(counts))
    return counts


@pytest.mark.parametrize("split", SPLITS)
def test_an_epoch_reads_every_token_that_was_written_once(prepared: Prepared, split: str) -> None:
    folder = prepared.path / split
    manifest = load_manifest(folder)
    written: dict[str, NDArray[np.int64]] = {}
    for source in manifest.sources:
        files = [np.fromfile(folder / f"{shard.name}.bin", DTYPES[source.dtype]) for shard in source.shards]
        assert [len(file) for file in files] == [shard.tokens for shard in source.shards]
        assert sum(len(file) for file in files) == source.tokens
        written[source.name] = np.bincount(
            np.concatenate([*files, np.zeros(0, np.int64)]).astype(np.int64), minlength=manifest.vocab_size
        )
        assert written[source.name][manifest.eot_id] == source.documents
    loader = Loader(folder, seq_len=SEQ_LEN, seed=1)
    read = real_tokens(loader, loader.n_sequences)
    assert read.sum() == manifest.tokens == sum(source.tokens for source in manifest.sources)
    assert (read == sum(written.values())).all()
    for source in (source for source in manifest.sources if source.tokens):
        alone = Loader(folder, seq_len=SEQ_LEN, seed=1, mixture=MixtureConfig(weights={source.name: 1}))
        assert (real_tokens(alone, -(-source.tokens // SEQ_LEN)) == written[source.name]).all()
    assert (real_tokens(loader, loader.n_sequences - 1) != read).any()  # one sequence less is seen
