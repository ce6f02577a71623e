"""Deduplication: the share of planted near-duplicates that is found, by similarity, beside theory; and what it costs.

50,000 documents take the way that preparation takes: signed, written to signature files, compared. Pairs of every similarity are
planted among them: the two of a pair begin with as many equal words as it takes, and their true similarity is counted. The second
table is the cost: hashing, signing and searching real text (the Python files of the standard library, and prose of words from them),
and comparing two million signatures within 256 MB.

    python -m benchmarks.dedup [--json FILE] [--documents 50000] [--pairs 1000] [--bands 14] [--rows 8]

`--json FILE` holds the first table, FILE with `-cost` before its ending the second.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import make_parser, print_table
from data_pipeline.cleaning.decontaminate import EvaluationNgrams
from data_pipeline.cleaning.dedup import find_duplicates, write_signatures
from data_pipeline.cleaning.minhash import MinHasher, detection_probability, similarity_threshold, text_hash
from data_pipeline.settings import DecontaminateConfig, DedupConfig

NGRAM = 5
SIMILARITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
BAR = 20
"""Characters of a bar for everything."""


def vocabulary(size: int = 30_000) -> NDArray[np.str_]:
    """Made-up words of 2 to 9 letters."""
    rng = np.random.default_rng(1)
    letters = rng.choice(list("etaoinshrdlucmfwypvbgkjqxz"), (size, 9))
    return np.array(["".join(word[:length]) for word, length in zip(letters, rng.integers(2, 10, size), strict=True)])


def plant(documents: int, pairs: int) -> tuple[list[str], dict[float, NDArray[np.int64]]]:
    """(texts of 70 to 250 words, numbers of the planted pairs by similarity, earlier one first)."""
    if 2 * pairs * len(SIMILARITIES) > documents:
        raise SystemExit(f"--pairs={pairs} at {len(SIMILARITIES)} similarities do not fit into --documents={documents}")
    rng, words = np.random.default_rng(2), vocabulary()
    place = rng.permutation(documents)
    numbers = np.sort(place[: 2 * pairs * len(SIMILARITIES)].reshape(len(SIMILARITIES), pairs, 2), axis=2)
    texts = [""] * documents
    for jaccard, of_pairs in zip(SIMILARITIES, numbers, strict=True):
        for first, second in of_pairs.tolist():
            shingles = int(rng.integers(66, 247))
            length = shingles + NGRAM - 1
            shared = round(2 * shingles * jaccard / (1 + jaccard)) + NGRAM - 1
            drawn = rng.choice(words, 2 * length - shared).tolist()
            texts[first], texts[second] = " ".join(drawn[:length]), " ".join(drawn[:shared] + drawn[length:])
    for number in place[numbers.size :].tolist():
        texts[number] = " ".join(rng.choice(words, int(rng.integers(70, 251))).tolist())
    return texts, dict(zip(SIMILARITIES, numbers, strict=True))


def jaccard_of(first: str, second: str) -> float:
    """Counted, not estimated."""
    one, other = (set(zip(*(text.split()[i:] for i in range(NGRAM)), strict=False)) for text in (first, second))
    return len(one & other) / len(one | other)


def dropped_of(texts: list[str], config: DedupConfig, folder: Path) -> NDArray[np.bool_]:
    """Which documents preparation would drop: signature files of 5,000 documents each, then the comparison."""
    signer, files = MinHasher(config.ngram, config.bands, config.rows), []
    for start in range(0, len(texts), 5000):
        batch = texts[start : start + 5000]
        files.append(folder / f"{start:08d}.signatures")
        hashes = np.array([text_hash(text) for text in batch], np.uint64)
        write_signatures(files[-1], hashes, signer.hash_bands(batch), np.ones(len(batch), np.bool_))
    return np.concatenate(find_duplicates(files, ["planted"] * len(files), config).codes) > 0


def curve(documents: int, pairs: int, config: DedupConfig, folder: Path) -> list[dict[str, object]]:
    """A row for each similarity, and one for the documents in no pair."""
    texts, planted = plant(documents, pairs)
    dropped = dropped_of(texts, config, folder)
    rows: list[dict[str, object]] = []
    for numbers in planted.values():
        true = [jaccard_of(texts[first], texts[second]) for first, second in numbers.tolist()]
        theory = float(np.mean([detection_probability(jaccard, config.bands, config.rows) for jaccard in true]))
        found = float(dropped[numbers[:, 1]].mean())
        error = max(theory * (1 - theory) / pairs, 1 / pairs**2) ** 0.5
        rows.append(
            {
                "jaccard": float(np.mean(true)),
                "documents": pairs,
                "found": found,
                "theory": theory,
                "sigmas": (found - theory) / error,
                "curve": bar(found, theory),
            }
        )
    alone = np.delete(dropped, np.concatenate([numbers.ravel() for numbers in planted.values()]))
    return [
        {
            "jaccard": 0.0,
            "documents": len(alone),
            "found": float(alone.mean()),
            "theory": 0.0,
            "curve": bar(float(alone.mean()), 0),
        },
        *rows,
    ]


def bar(found: float, theory: float) -> str:
    """What was found as a bar, with a line where theory has it."""
    cells = ["█" if (i + 0.5) / BAR <= found else "·" for i in range(BAR)]
    cells[min(BAR - 1, int(theory * BAR))] = "│"
    return "".join(cells)


def cost(config: DedupConfig, folder: Path) -> list[dict[str, object]]:
    """CPU seconds and the peak of what numpy and Python hold, stage by stage."""
    source = [
        file.read_text("utf-8", errors="replace")
        for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:3000]
    ]
    rng, words = (
        np.random.default_rng(3),
        np.array([word for text in source[:300] for word in text.split() if word.isalpha()]),
    )
    prose = [" ".join(rng.choice(words, 600).tolist()) for _ in range(5000)]
    evaluation = folder / "evaluation.txt"
    evaluation.write_text(" ".join(prose[:500]), encoding="utf-8")
    contamination = EvaluationNgrams.load(DecontaminateConfig(paths=(str(evaluation),)))
    assert contamination is not None
    signer = MinHasher(config.ngram, config.bands, config.rows)
    stages: dict[str, Callable[[list[str]], object]] = {
        "hash of the text": lambda texts: [text_hash(text) for text in texts],
        f"sign, {config.bands} x {config.rows}": signer.hash_bands,
        f"search {contamination.n_ngrams:,} n-grams": contamination.find_contaminated,
    }
    rows: list[dict[str, object]] = []
    for kind, texts in (("Python", source), ("prose", prose), ("one text", [" ".join(prose)])):
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        for stage, work in stages.items():
            seconds, peak = measured(partial(work, texts))
            rows.append(
                {"stage": stage, "text": kind, "MB": megabytes, "MB_per_cpu_s": megabytes / seconds, "peak_MB": peak}
            )
    return rows


def cost_of_comparing(config: DedupConfig, folder: Path, documents: int = 2_000_000) -> dict[str, object]:
    """A row for random signatures, a tenth of which repeat others."""
    rng, files = np.random.default_rng(4), []
    for start in range(0, documents, 100_000):
        columns = rng.integers(1, 2**64, (100_000, 1 + config.bands), np.uint64)
        columns[:10_000] = rng.permutation(columns[10_000:20_000])
        files.append(folder / f"{start:08d}.random")
        write_signatures(files[-1], columns[:, 0], columns[:, 1:], np.ones(len(columns), np.bool_))
    seconds, peak = measured(lambda: find_duplicates(files, ["random"] * len(files), config), repeats=1)
    return {
        "stage": f"compare {documents:,} documents",
        "text": f"memory_mb={config.memory_mb:g}",
        "cpu_s": seconds,
        "peak_MB": peak,
    }


def measured(work: Callable[[], object], repeats: int = 3) -> tuple[float, float]:
    """(CPU seconds of the fastest of some runs, peak MB of another one: counting memory takes time)."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return min(seconds), peak / 1e6


def main() -> None:
    arguments = make_parser(__doc__)
    arguments.add_argument("--documents", type=int, default=50_000)
    arguments.add_argument("--pairs", type=int, default=1000, help="planted for each similarity")
    arguments.add_argument("--bands", type=int, default=14)
    arguments.add_argument("--rows", type=int, default=8)
    options = arguments.parse_args()
    config = DedupConfig(exact=True, minhash=True, ngram=NGRAM, bands=options.bands, rows=options.rows, memory_mb=256)
    with tempfile.TemporaryDirectory() as name:
        rows = curve(options.documents, options.pairs, config, Path(name))
        half = f"half are found at J={similarity_threshold(config.bands, config.rows):.3f}"
        print_table(
            f"MinHash on {options.documents:,} documents, {config.bands} bands of {config.rows}: {half}",
            rows,
            options.json,
        )
        rows = [*cost(config, Path(name)), cost_of_comparing(config, Path(name))]
        second = options.json and options.json.with_stem(f"{options.json.stem}-cost")
        print_table("What it costs, one process", rows, second)


if __name__ == "__main__":
    main()
