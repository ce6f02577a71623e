"""The data pipeline beside its peers: text to verified shards, and shards to batches.

Speeds are per CPU-second of all processes, user and system.

Tokenizing: Python sources as jsonl, one byte-level BPE with 32k tokens. Ours goes from the jsonl file to committed
shards and reads all of them back to verify. Its peers are `tokenizers.encode_batch_fast` on texts in memory, which
writes nothing; datatrove's tokenizer pipeline, jsonl to its .ds files; `datasets.map` with encode_batch_fast, jsonl to
Arrow. Each case runs in a process of its own, in turns; the table holds medians.

Reading: shuffled batches of 8 x 2048 tokens with labels and document ids, of a mixture of three sources, every sample
new, beside a bare gather of as many rows from one memory-mapped file. Then the time to open a data set of 10 million
documents and 10 billion tokens, and the time to find the first, a middle and the last batch of its epochs.

    python -m benchmarks.data [--json FILE] [--mb 100] [--rounds 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from benchmarks.data import reading, tokenizing
from benchmarks.data.measure import Measurements

TOKENIZING_CASES: dict[str, Callable[[Path], Measurements]] = {
    "tokenizers.encode_batch_fast": tokenizing.encode_batch_fast,
    "datatrove": tokenizing.datatrove,
    "datasets.map": tokenizing.datasets_map,
    "ours, jsonl to verified shards": tokenizing.prepare_and_verify,
    "the same, deduplicated": tokenizing.prepare_deduplicated,
}
READING_CASES: dict[str, Callable[[Path], Measurements]] = {
    "gather": reading.gather_and_batches,
    "large": reading.open_large,
}
BASELINE = "tokenizers.encode_batch_fast"
OURS = ("ours, jsonl to verified shards", "the same, deduplicated")
TARGETS = {"ours, jsonl to verified shards": ">= 10"}


def measure_in_process(case: str, folder: Path) -> Measurements:
    """Run a case in a process of its own. A case that fails returns {"failed": last line of its stderr}."""
    command = [sys.executable, "-m", "benchmarks.data", "--folder", str(folder), "--case", case]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    results: Measurements = json.loads(done.stdout.splitlines()[-1])
    return results


def tokenizing_rows(folder: Path, rounds: int) -> Iterator[dict[str, object]]:
    """Yield a row for each tool."""
    corpus_mb = {
        name: sum(len(text.encode()) for text in tokenizing.read_texts(folder, name)) / 1e6 for name in ("all", "part")
    }
    runs = [{case: measure_in_process(case, folder) for case in TOKENIZING_CASES} for _ in range(rounds)]
    for case in TOKENIZING_CASES:
        megabytes = corpus_mb["all" if case in OURS else "part"]
        results = [run[case] for run in runs]
        if any("failed" in result for result in results):
            yield {"tokenizing": case, "MB": megabytes, "why not": results[0].get("failed")}
            continue
        ratios = [run[BASELINE]["cpu"] / corpus_mb["part"] * megabytes / run[case]["cpu"] for run in runs]
        yield {
            "tokenizing": case,
            "MB": megabytes,
            "MB/CPU-s": median(megabytes / result["cpu"] for result in results),
            "MB/s": median(megabytes / result["wall"] for result in results),
            "ratio": median(ratios),
            "wanted": TARGETS.get(case, ""),
        }


def reading_rows(folder: Path) -> list[dict[str, object]]:
    """Return a row for each claim about reading."""
    rates, large = measure_in_process("gather", folder), measure_in_process("large", folder)
    name = f"{large['documents'] / 1e6:.0f}M documents, {large['tokens'] / 1e9:.0f}B tokens"
    order = "order of first, middle and last batch of 20 epochs, ms"
    rows = [
        ("bare memmap gather, M tokens/CPU-s", rates["gather"] / 1e6, ""),
        ("batches with labels and document ids, M tokens/CPU-s", rates["batches"] / 1e6, ""),
        ("ratio", rates["batches"] / rates["gather"], ">= 0.25"),
        (f"opening {name}, ms", large["open_ms"], "< 50"),
        (f"opening {name}, growth in MB", large["growth_mb"], "< 50"),
        (f"{order}, median", median(large["order_ms"]), ""),
        (f"{order}, worst", max(large["order_ms"]), "< 5"),
    ]
    return [{"reading": reading, "value": value, "wanted": wanted} for reading, value, wanted in rows]


def main() -> None:
    """Print both tables.

    `--json FILE` holds the first; the second goes beside it, with `-reading` at the end of the name.
    """
    from benchmarks.common import make_parser, print_table

    parser = make_parser(__doc__)
    parser.add_argument("--mb", type=float, default=100, help="megabytes of text to tokenize")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case")
    parser.add_argument("--folder", type=Path, help="keep all files here instead of in a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizing.write_corpus(folder, args.mb)
        print_table("Tokenizing", list(tokenizing_rows(folder, args.rounds)), args.json)
        reading_file = args.json and args.json.with_stem(f"{args.json.stem}-reading")
        print_table("Reading", reading_rows(folder), reading_file)


def run_case() -> None:
    """Run one case in this process, and print its results as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--case")
    args = parser.parse_args()
    cases = TOKENIZING_CASES | READING_CASES
    print(json.dumps(cases[args.case](args.folder)))


if __name__ == "__main__":
    if "--case" in sys.argv:
        run_case()
    else:
        main()
