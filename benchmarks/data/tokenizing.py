"""Text to shards of tokens: our pipeline and its peers on the same text and tokenizer."""

from __future__ import annotations

import json
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.data.measure import Measurements, measure_time

PEER_FRACTION = 5
"""The slow peers get one text in five. Their start-up of about half a second is measured too. The ratio is against
encode_batch_fast, which starts up before the clock does."""

TOKENIZER_VOCAB_SIZE = 32_768
TOKENIZER_BYTES = 20e6


def write_corpus(folder: Path, megabytes: float) -> None:
    """Write Python sources as `all.jsonl`, a part of them as `part.jsonl`, and a tokenizer trained on some."""
    from data_pipeline.tokenizing.tokenizer import train_tokenizer

    if (folder / "tokenizer.json").exists():
        return
    texts, size = [], 0
    for text in python_sources():
        if size >= megabytes * 1e6:
            break
        texts.append(text)
        size += len(text.encode())
    for name, selected in (("all", texts), ("part", texts[::PEER_FRACTION])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in selected))
    sample = texts[:: max(1, round(size / TOKENIZER_BYTES))]
    train_tokenizer(sample, TOKENIZER_VOCAB_SIZE, folder / "tokenizer.json")


def python_sources() -> Iterator[str]:
    """Yield the standard library's files, then those of the installed packages; empty files are left out."""
    for scheme in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_paths()[scheme]).rglob("*.py")):
            if scheme == "stdlib" and "site-packages" in file.parts:
                continue
            text = file.read_text(errors="replace")
            if text.strip():
                yield text


def read_texts(folder: Path, name: str) -> list[str]:
    """Return the texts of a corpus file."""
    with (folder / f"{name}.jsonl").open() as lines:
        return [json.loads(line)["text"] for line in lines]


def encode_batch_fast(folder: Path) -> Measurements:
    """Measure `tokenizers.encode_batch_fast` on texts in memory. It writes nothing."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = read_texts(folder, "part")

    def encode() -> None:
        for start in range(0, len(texts), 100):
            backend.encode_batch_fast(texts[start : start + 100], add_special_tokens=False)

    return measure_time(encode)


def datatrove(folder: Path) -> Measurements:
    """Measure datatrove's tokenizer pipeline: jsonl to .ds files."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    out = folder / "datatrove"
    shutil.rmtree(out, ignore_errors=True)
    reader = JsonlReader(str(folder), glob_pattern="part.jsonl", default_metadata={})
    tokenizer = DocumentTokenizer(
        str(out / "tokens"), tokenizer_name_or_path=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    return measure_time(LocalPipelineExecutor([reader, tokenizer], logging_dir=str(out / "logs")).run)


def datasets_map(folder: Path) -> Measurements:
    """Measure `datasets.map` with encode_batch_fast: jsonl to Arrow files."""
    import datasets
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in backend.encode_batch_fast(rows["text"], add_special_tokens=False)]}

    def encode_file() -> None:
        rows = datasets.load_dataset(
            "json", data_files=str(folder / "part.jsonl"), split="train", cache_dir=tempfile.mkdtemp(dir=folder)
        )
        rows.map(encode, batched=True, remove_columns=["text"]).save_to_disk(tempfile.mkdtemp(dir=folder))

    return measure_time(encode_file)


def prepare_and_verify(folder: Path, **settings: Any) -> Measurements:
    """Measure our preparation: jsonl to shards on disk, then reading all of them back to verify."""
    from data_pipeline.prepare import prepare
    from data_pipeline.settings import PrepareConfig, SourceConfig
    from data_pipeline.storage.verify import verify

    out = folder / "ours"
    shutil.rmtree(out, ignore_errors=True)
    sources = (SourceConfig(kind="jsonl", paths=(str(folder / "all.jsonl"),)),)
    config = PrepareConfig(sources=sources, tokenizer=folder / "tokenizer.json", validation_fraction=0.001, **settings)
    notes: list[str] = []

    def run() -> None:
        notes.extend(prepare(out, config).notes)
        assert not verify(out).problems

    return measure_time(run) | {"notes": notes}


def prepare_deduplicated(folder: Path) -> Measurements:
    """Measure the same with exact and near duplicates dropped."""
    from data_pipeline.settings import DedupConfig

    return prepare_and_verify(folder, dedup=DedupConfig(exact=True, minhash=True))
