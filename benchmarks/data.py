"""The data pipeline beside its peers: text to verified shards, and shards to batches. CPU-seconds of all processes, user and system.

Tokenizing: Python sources as jsonl, one 32k byte-level BPE. Ours goes from the jsonl file to committed shards and reads all of them
back to verify. Beside it: `tokenizers.encode_batch_fast` on texts that are in memory already, writing nothing; `datatrove`'s
tokenizer pipeline, jsonl to its .ds files; `datasets.map` with encode_batch_fast, jsonl to Arrow. Each in a process of its own, in
turns; medians.

Reading: shuffled batches of 8 x 2048 tokens with labels and document ids, of a mixture of three sources, every sample new, beside a
bare gather of as many rows from one memory-mapped file. Then opening a set of 10 million documents and 10 billion tokens, and the
time until the first, a middle and the last batch of its epochs are known.

    python -m benchmarks.data [--json FILE] [--mb 100] [--rounds 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

PEER_SHARE = 5
"""The slow peers get this part of the text. Their start-up, about half a second, counts; encode_batch_fast, which the ratio is against,
has none in the clock."""

SEQ_LEN, ROWS = 2048, 8
WEIGHTS = {"web": 0.5, "code": 0.3, "books": 0.2}
Figures = dict[str, Any]  # Any: what a case measured goes through JSON


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def timed(work: Callable[[], object]) -> Figures:
    """CPU and wall seconds of some work."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    work()
    return {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}


def write_corpus(folder: Path, megabytes: float) -> None:
    """Python sources of this machine as `all.jsonl`, a part of them as `part.jsonl`, and a tokenizer of 32k tokens trained on some."""
    from data_pipeline.tokenizing.tokenizer import train_tokenizer

    if (folder / "tokenizer.json").exists():
        return
    texts, size = [], 0
    for place in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_paths()[place]).rglob("*.py")):
            if (
                size < megabytes * 1e6
                and (text := file.read_text(errors="replace")).strip()
                and not (place == "stdlib" and "site-packages" in file.parts)
            ):
                texts.append(text)
                size += len(text.encode())
    for name, some in (("all", texts), ("part", texts[::PEER_SHARE])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    train_tokenizer(texts[:: max(1, round(size / 20e6))], 32_768, folder / "tokenizer.json")


def texts_of(folder: Path, name: str) -> list[str]:
    """The texts of a corpus file."""
    with (folder / f"{name}.jsonl").open() as lines:
        return [json.loads(line)["text"] for line in lines]


def encode_batch_fast(folder: Path) -> Figures:
    """The bare loop."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = texts_of(folder, "part")
    return timed(
        lambda: [
            backend.encode_batch_fast(texts[i : i + 100], add_special_tokens=False) for i in range(0, len(texts), 100)
        ]
    )


def datatrove(folder: Path) -> Figures:
    """jsonl to .ds."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    out = folder / "datatrove"
    shutil.rmtree(out, ignore_errors=True)
    reader = JsonlReader(str(folder), glob_pattern="part.jsonl", default_metadata={})
    tokenizer = DocumentTokenizer(
        str(out / "tokens"), tokenizer_name_or_path=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    return timed(LocalPipelineExecutor([reader, tokenizer], logging_dir=str(out / "logs")).run)


def datasets_map(folder: Path) -> Figures:
    """jsonl to Arrow."""
    import datasets
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in backend.encode_batch_fast(rows["text"], add_special_tokens=False)]}

    def work() -> None:
        rows = datasets.load_dataset(
            "json", data_files=str(folder / "part.jsonl"), split="train", cache_dir=tempfile.mkdtemp(dir=folder)
        )
        rows.map(encode, batched=True, remove_columns=["text"]).save_to_disk(tempfile.mkdtemp(dir=folder))

    return timed(work)


def ours(folder: Path, **settings: Any) -> Figures:
    """jsonl to shards, verified."""
    from data_pipeline.prepare import prepare
    from data_pipeline.settings import PrepareConfig, SourceConfig
    from data_pipeline.storage.verify import verify

    out = folder / "ours"
    shutil.rmtree(out, ignore_errors=True)
    sources = (SourceConfig(kind="jsonl", paths=(str(folder / "all.jsonl"),)),)
    config = PrepareConfig(sources=sources, tokenizer=folder / "tokenizer.json", validation_fraction=0.001, **settings)
    notes: list[str] = []

    def work() -> None:
        notes.extend(prepare(out, config).notes)
        assert not verify(out).problems

    return timed(work) | {"notes": notes}


def ours_deduplicated(folder: Path) -> Figures:
    """The same with exact and near-duplicates dropped."""
    from data_pipeline.settings import DedupConfig

    return ours(folder, dedup=DedupConfig(exact=True, minhash=True))


def document_lengths(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Log-normal around 1500."""
    lengths = np.minimum(rng.lognormal(np.log(1500) - 0.5, 1.0, tokens // 1000).astype(np.int32) + 2, 100_000)
    return lengths[: int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens))]


def write_set(folder: Path, shards: dict[str, int], write: Callable[[Path, str], Any]) -> Path:
    """A training split of so many shards by source, each made by `write`, whose result is the shard's entry in the manifest."""
    from data_pipeline.settings import PrepareConfig
    from data_pipeline.storage.manifest import MANIFEST, Recipe, SourceManifest, SplitManifest

    split = folder / "train"
    if (split / MANIFEST).exists():
        return split
    split.mkdir(parents=True, exist_ok=True)
    sources = []
    for name, count in shards.items():
        made = tuple(write(split, f"{name}-{number:05d}") for number in range(count))
        sources.append(
            SourceManifest(
                name=name,
                documents=sum(shard.documents for shard in made),
                tokens=sum(shard.tokens for shard in made),
                text_bytes=None,
                dtype="uint16",
                ends_with_eot=False,
                dropped={},
                repaired={},
                marked={},
                shards=made,
            )
        )
    recipe = Recipe(settings=PrepareConfig(), trained_tokenizer=False, listings=(), lists="", made_with={})
    manifest = SplitManifest(
        split="train",
        splits=("train",),
        vocab_size=60_000,
        eot_id=0,
        tokenizer="",
        recipe=recipe,
        sources=tuple(sources),
    )
    (split / MANIFEST).write_bytes(manifest.to_bytes())
    return split


def gather_and_batches(folder: Path) -> Figures:
    """Tokens by CPU-second of a bare gather and of our loader, in turns; medians."""
    from data_pipeline.reading.loader import Loader
    from data_pipeline.settings import MixtureConfig
    from data_pipeline.storage.shard_writer import write_shard

    rng = np.random.default_rng(0)

    def shard(split: Path, name: str) -> Any:
        lengths = document_lengths(rng, 20_000_000)
        return write_shard(split, name, rng.integers(0, 60_000, int(lengths.sum()), np.uint16), lengths, "uint16")

    split = write_set(folder / "read", {"web": 5, "code": 3, "books": 2}, shard)
    with (folder / "bare.bin").open("wb") as bare:
        for file in sorted(split.glob("*.bin")):
            bare.write(file.read_bytes())
    tokens = np.memmap(folder / "bare.bin", np.uint16, "r")
    loader = Loader(split, seq_len=SEQ_LEN, seed=1, mixture=MixtureConfig(by="tokens", weights=WEIGHTS))
    for first in range(0, 4 * loader.n_sequences, 64):  # every block is read and checked, in both
        loader.batch(first, 64)
    tokens.sum()
    turns, at = 512, 4 * loader.n_sequences
    rates: dict[str, list[float]] = {"gather": [], "batches": []}
    for _ in range(41):
        starts = (rng.integers(0, len(tokens) // SEQ_LEN, (turns, ROWS)) * SEQ_LEN).tolist()
        began = time.process_time()
        for rows in starts:
            np.stack([tokens[start : start + SEQ_LEN] for start in rows])
        rates["gather"].append(turns * ROWS * SEQ_LEN / (time.process_time() - began))
        began = time.process_time()
        for _ in range(turns):
            loader.batch(at, ROWS)
            at += ROWS
        rates["batches"].append(turns * ROWS * SEQ_LEN / (time.process_time() - began))
    return {name: median(values) for name, values in rates.items()}


def open_large(folder: Path) -> Figures:
    """Opening 10M documents of 10B tokens, and the order of its epochs. The tokens are holes in files; nothing here reads one."""
    import xxhash

    from data_pipeline.reading.loader import Loader
    from data_pipeline.storage.manifest import BLOCK_BYTES, Shard
    from data_pipeline.storage.shards import encode_index

    rng, size = np.random.default_rng(0), 250_000_000
    blocks = [xxhash.xxh3_64_hexdigest(bytes(n)) for n in (BLOCK_BYTES, size % BLOCK_BYTES)]

    def shard(split: Path, name: str) -> Shard:
        lengths = rng.integers(100, 1901, 125_000, np.int32)
        lengths[-1] += 125_000_000 - lengths.sum()
        index = encode_index(lengths, "uint16")
        (split / f"{name}.idx").write_bytes(index)
        with (split / f"{name}.bin").open("wb") as stream:
            stream.truncate(size)
        return Shard(
            name=name,
            tokens=125_000_000,
            documents=125_000,
            bin_bytes=size,
            idx_bytes=len(index),
            bin_xxh3_128="",
            idx_xxh3_128=xxhash.xxh3_128_hexdigest(index),
            bin_blocks_xxh3_64=blocks[0] * (size // BLOCK_BYTES) + blocks[1],
        )

    split = write_set(folder / "large", {"web": 50, "code": 20, "books": 10}, shard)
    before, began = resident_megabytes(), time.perf_counter()
    loader = Loader(split, seq_len=SEQ_LEN, seed=1)
    figures = {"open_ms": 1e3 * (time.perf_counter() - began), "growth_mb": resident_megabytes() - before}
    n, orders = loader.n_sequences, []
    for epoch in range(20):
        for first in (epoch * n, epoch * n + n // 2, (epoch + 1) * n - ROWS):
            fresh = Loader(split, seq_len=SEQ_LEN, seed=1)  # with nothing computed yet
            began = time.perf_counter()
            fresh.order(first, ROWS)
            orders.append(1e3 * (time.perf_counter() - began))
    return figures | {"order_ms": orders, "tokens": loader.n_tokens, "documents": loader.manifest.documents}


def resident_megabytes() -> float:
    """Memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


CASES: dict[str, Callable[[Path], Figures]] = {
    "tokenizers.encode_batch_fast": encode_batch_fast,
    "datatrove": datatrove,
    "datasets.map": datasets_map,
    "ours, jsonl to verified shards": ours,
    "the same, deduplicated": ours_deduplicated,
    "gather": gather_and_batches,
    "large": open_large,
}
TOKENIZING = tuple(CASES)[:5]


def measure(case: str, folder: Path) -> Figures:
    """Run a case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data", "--folder", str(folder), "--case", case]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def tokenizing_rows(folder: Path, rounds: int) -> Iterator[dict[str, object]]:
    """A row for each tool."""
    size = {name: sum(len(text.encode()) for text in texts_of(folder, name)) / 1e6 for name in ("all", "part")}
    runs = [{case: measure(case, folder) for case in TOKENIZING} for _ in range(rounds)]
    for case in TOKENIZING:
        read = size["all" if CASES[case] in (ours, ours_deduplicated) else "part"]
        figures = [run[case] for run in runs]
        if any("failed" in figure for figure in figures):
            yield {"tokenizing": case, "MB": read, "why not": figures[0].get("failed")}
            continue
        ratios = [run[TOKENIZING[0]]["cpu"] / size["part"] * read / run[case]["cpu"] for run in runs]
        yield {
            "tokenizing": case,
            "MB": read,
            "MB/CPU-s": median(read / figure["cpu"] for figure in figures),
            "MB/s": median(read / figure["wall"] for figure in figures),
            "ratio": median(ratios),
            "wanted": {ours: ">= 10"}.get(CASES[case], ""),
        }


def reading_rows(folder: Path) -> Iterator[dict[str, object]]:
    """A row for each claim about reading."""
    read, large = measure("gather", folder), measure("large", folder)
    yield {"reading": "bare memmap gather, M tokens/CPU-s", "value": read["gather"] / 1e6, "wanted": ""}
    yield {
        "reading": "batches with labels and document ids, M tokens/CPU-s",
        "value": read["batches"] / 1e6,
        "wanted": "",
    }
    yield {"reading": "ratio", "value": read["batches"] / read["gather"], "wanted": ">= 0.25"}
    name = f"{large['documents'] / 1e6:.0f}M documents, {large['tokens'] / 1e9:.0f}B tokens"
    yield {"reading": f"opening {name}, ms", "value": large["open_ms"], "wanted": "< 50"}
    yield {"reading": f"opening {name}, growth in MB", "value": large["growth_mb"], "wanted": "< 50"}
    yield {
        "reading": "order of first, middle and last batch of 20 epochs, ms, median",
        "value": median(large["order_ms"]),
        "wanted": "",
    }
    yield {
        "reading": "order of first, middle and last batch of 20 epochs, ms, worst",
        "value": max(large["order_ms"]),
        "wanted": "< 5",
    }


def main() -> None:
    """Both tables; `--json FILE` holds the first, FILE with `-reading` before its ending the second."""
    from benchmarks.common import make_parser, print_table

    command_line = make_parser(__doc__)
    command_line.add_argument("--mb", type=float, default=100, help="megabytes of text to tokenize")
    command_line.add_argument("--rounds", type=int, default=3)
    command_line.add_argument(
        "--folder", type=Path, help="where to work and leave everything; default: a temporary folder"
    )
    arguments = command_line.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_corpus(folder, arguments.mb)
        print_table("Tokenizing", list(tokenizing_rows(folder, arguments.rounds)), arguments.json)
        reading = arguments.json and arguments.json.with_stem(f"{arguments.json.stem}-reading")
        print_table("Reading", list(reading_rows(folder)), reading)


if __name__ == "__main__":
    if "--case" in sys.argv:
        inner = argparse.ArgumentParser()
        inner.add_argument("--folder", type=Path)
        inner.add_argument("--case")
        given = inner.parse_args()
        print(json.dumps(CASES[given.case](given.folder)))
    else:
        main()
