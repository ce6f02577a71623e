"""Deduplication: the share of planted near-duplicates that is found at each similarity, and what it costs.

50,000 documents are deduplicated as preparation does it: MinHash signatures, signature files, comparison. Pairs of
every similarity are planted among them. The two documents of a pair begin with the same words, as many as the
similarity takes, and their true similarity is counted. The second table is the cost: hashing, signing and searching
real text (the Python files of the standard library, and prose made of their words), and comparing two million
signatures within 256 MB.

    python -m benchmarks.dedup [--json FILE] [--documents 50000] [--pairs 1000] [--bands 14] [--rows 8]

`--json FILE` holds the first table. The second goes beside it, with `-cost` at the end of the name.
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
BAR_WIDTH = 20
"""Characters of a bar at 100%."""


def make_words(size: int = 30_000) -> NDArray[np.str_]:
    """Return random words of 2 to 9 letters."""
    rng = np.random.default_rng(1)
    letters = rng.choice(list("etaoinshrdlucmfwypvbgkjqxz"), (size, 9))
    return np.array(["".join(word[:length]) for word, length in zip(letters, rng.integers(2, 10, size), strict=True)])


def plant_pairs(n_documents: int, n_pairs: int) -> tuple[list[str], dict[float, NDArray[np.int64]]]:
    """Return random texts of 70 to 250 words, and the planted pairs.

    Args:
        n_documents: texts in all.
        n_pairs: pairs at each of SIMILARITIES.

    Returns:
        The texts, and for each similarity the indices of the pairs, [n_pairs, 2], the earlier text of a pair first.
    """
    n_planted = 2 * n_pairs * len(SIMILARITIES)
    if n_planted > n_documents:
        raise SystemExit(
            f"--pairs={n_pairs} at {len(SIMILARITIES)} similarities do not fit into --documents={n_documents}"
        )
    rng, words = np.random.default_rng(2), make_words()
    order = rng.permutation(n_documents)
    pairs = np.sort(order[:n_planted].reshape(len(SIMILARITIES), n_pairs, 2), axis=2)
    texts = [""] * n_documents
    for jaccard, pairs_of_similarity in zip(SIMILARITIES, pairs, strict=True):
        for first, second in pairs_of_similarity.tolist():
            shingles = int(rng.integers(66, 247))
            length = shingles + NGRAM - 1
            shared = round(2 * shingles * jaccard / (1 + jaccard)) + NGRAM - 1
            drawn = rng.choice(words, 2 * length - shared).tolist()
            texts[first], texts[second] = " ".join(drawn[:length]), " ".join(drawn[:shared] + drawn[length:])
    for index in order[n_planted:].tolist():
        texts[index] = " ".join(rng.choice(words, int(rng.integers(70, 251))).tolist())
    return texts, dict(zip(SIMILARITIES, pairs, strict=True))


def jaccard_similarity(first: str, second: str) -> float:
    """Return the exact Jaccard similarity of the n-grams of two texts."""
    a, b = (set(zip(*(text.split()[i:] for i in range(NGRAM)), strict=False)) for text in (first, second))
    return len(a & b) / len(a | b)


def find_dropped(texts: list[str], config: DedupConfig, folder: Path) -> NDArray[np.bool_]:
    """Return which documents preparation drops. Writes signature files of 5,000 documents each."""
    hasher, files = MinHasher(config.ngram, config.bands, config.rows), []
    for start in range(0, len(texts), 5000):
        batch = texts[start : start + 5000]
        files.append(folder / f"{start:08d}.signatures")
        hashes = np.array([text_hash(text) for text in batch], np.uint64)
        write_signatures(files[-1], hashes, hasher.hash_bands(batch), np.ones(len(batch), np.bool_))
    return np.concatenate(find_duplicates(files, ["planted"] * len(files), config).codes) > 0


def detection_rows(n_documents: int, n_pairs: int, config: DedupConfig, folder: Path) -> list[dict[str, object]]:
    """Return a row for the documents in no pair, then one for each similarity."""
    texts, planted = plant_pairs(n_documents, n_pairs)
    dropped = find_dropped(texts, config, folder)
    unpaired = np.delete(dropped, np.concatenate([pairs.ravel() for pairs in planted.values()]))
    found = float(unpaired.mean())
    rows: list[dict[str, object]] = [
        {"jaccard": 0.0, "documents": len(unpaired), "found": found, "theory": 0.0, "curve": draw_bar(found, 0)}
    ]
    for pairs in planted.values():
        similarities = [jaccard_similarity(texts[first], texts[second]) for first, second in pairs.tolist()]
        theory = float(np.mean([detection_probability(j, config.bands, config.rows) for j in similarities]))
        found = float(dropped[pairs[:, 1]].mean())
        standard_error = max(theory * (1 - theory) / n_pairs, 1 / n_pairs**2) ** 0.5
        rows.append(
            {
                "jaccard": float(np.mean(similarities)),
                "documents": n_pairs,
                "found": found,
                "theory": theory,
                "sigmas": (found - theory) / standard_error,
                "curve": draw_bar(found, theory),
            }
        )
    return rows


def draw_bar(found: float, theory: float) -> str:
    """Return the found share as a bar, with a line where theory expects its end."""
    cells = ["█" if (i + 0.5) / BAR_WIDTH <= found else "·" for i in range(BAR_WIDTH)]
    cells[min(BAR_WIDTH - 1, int(theory * BAR_WIDTH))] = "│"
    return "".join(cells)


def stage_cost_rows(config: DedupConfig, folder: Path) -> list[dict[str, object]]:
    """Return speed and peak memory of each stage on each kind of text. The memory is what numpy and Python allocate."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))[:3000]
    source = [file.read_text("utf-8", errors="replace") for file in files]
    rng = np.random.default_rng(3)
    words = np.array([word for text in source[:300] for word in text.split() if word.isalpha()])
    prose = [" ".join(rng.choice(words, 600).tolist()) for _ in range(5000)]
    evaluation_file = folder / "evaluation.txt"
    evaluation_file.write_text(" ".join(prose[:500]), encoding="utf-8")
    evaluation = EvaluationNgrams.load(DecontaminateConfig(paths=(str(evaluation_file),)))
    assert evaluation is not None
    hasher = MinHasher(config.ngram, config.bands, config.rows)
    stages: dict[str, Callable[[list[str]], object]] = {
        "hash of the text": lambda texts: [text_hash(text) for text in texts],
        f"sign, {config.bands} x {config.rows}": hasher.hash_bands,
        f"search {evaluation.n_ngrams:,} n-grams": evaluation.find_contaminated,
    }
    rows: list[dict[str, object]] = []
    for kind, texts in (("Python", source), ("prose", prose), ("one text", [" ".join(prose)])):
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        for stage, work in stages.items():
            seconds, peak_mb = measure_cost(partial(work, texts))
            cost = {"MB": megabytes, "MB_per_cpu_s": megabytes / seconds, "peak_MB": peak_mb}
            rows.append({"stage": stage, "text": kind, **cost})
    return rows


def comparison_cost_row(config: DedupConfig, folder: Path, n_documents: int = 2_000_000) -> dict[str, object]:
    """Return the cost of comparing random signatures, a tenth of which repeat others."""
    rng, files = np.random.default_rng(4), []
    for start in range(0, n_documents, 100_000):
        columns = rng.integers(1, 2**64, (100_000, 1 + config.bands), np.uint64)
        columns[:10_000] = rng.permutation(columns[10_000:20_000])
        files.append(folder / f"{start:08d}.random")
        write_signatures(files[-1], columns[:, 0], columns[:, 1:], np.ones(len(columns), np.bool_))
    seconds, peak_mb = measure_cost(lambda: find_duplicates(files, ["random"] * len(files), config), repeats=1)
    return {
        "stage": f"compare {n_documents:,} documents",
        "text": f"memory_mb={config.memory_mb:g}",
        "cpu_s": seconds,
        "peak_MB": peak_mb,
    }


def measure_cost(work: Callable[[], object], repeats: int = 3) -> tuple[float, float]:
    """Return (CPU seconds of the fastest of `repeats` runs, peak MB of one more run: tracing memory takes time)."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return min(seconds), peak / 1e6


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--pairs", type=int, default=1000, help="pairs planted at each similarity")
    parser.add_argument("--bands", type=int, default=14)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    config = DedupConfig(exact=True, minhash=True, ngram=NGRAM, bands=args.bands, rows=args.rows, memory_mb=256)
    with tempfile.TemporaryDirectory() as name:
        rows = detection_rows(args.documents, args.pairs, config, Path(name))
        half = f"half are found at J={similarity_threshold(config.bands, config.rows):.3f}"
        title = f"MinHash on {args.documents:,} documents, {config.bands} bands of {config.rows}: {half}"
        print_table(title, rows, args.json)
        rows = [*stage_cost_rows(config, Path(name)), comparison_cost_row(config, Path(name))]
        cost_file = args.json and args.json.with_stem(f"{args.json.stem}-cost")
        print_table("What it costs, one process", rows, cost_file)


if __name__ == "__main__":
    main()
