"""Workers: they do not influence the result, hold one chunk at a time, and end with their use."""

import json
import os
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpus import find_corpus
from data_pipeline.errors import DataError
from data_pipeline.prepare import StageProgress
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.prepared import PreparedData
from data_pipeline.tokenizing.tokenize import TokenizeJob, TokenizeSetup, init_worker
from data_pipeline.tokenizing.tokenizer import load_tokenizer
from data_pipeline.workers import Progress, ProgressCallback, run_jobs

Prepare = Callable[..., PreparedData]
FOREVER = 3600.0

SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu")


def write_jsonl(file: Path, documents: int, seed: int) -> None:
    """Documents of 20 to 80 words; of seven, one is short, one repeats another, and one nearly repeats another."""
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    for i in range(documents):
        words = ["".join(rng.choice(SYLLABLES, 3)) for _ in range(int(rng.integers(20, 80)))]
        if i % 7 == 1:
            words = words[:2]
        elif i % 7 == 2:
            words = texts[-2].upper().split()
        elif i % 7 == 3:
            words = [*texts[-3].split(), "more"]
        texts.append(" ".join(words))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[SourceConfig, ...]:
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("one", "two")):
        write_jsonl(folder / f"{name}.jsonl", 210, seed)
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write("\n" * 7000)  # two chunks without a document
    return tuple(SourceConfig(kind="jsonl", paths=(str(folder / f"{name}.jsonl"),)) for name in ("one", "two"))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


CLEAN = {
    "filters": {"apply": ["length"], "length": {"min_characters": 40}},
    "dedup": {"exact": True, "minhash": True},
    "keep_rejects": True,
}


def test_one_two_and_three_workers_write_the_same_bytes(
    tmp_path: Path, sources: tuple[SourceConfig, ...], prepare_at: Prepare
) -> None:
    made = {n: prepare_at(tmp_path / str(n), tmp_path, sources=sources, workers=n, **CLEAN) for n in (1, 2, 3)}
    files = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == contents(tmp_path / "3") == files
    assert sum(name.endswith(".bin") for name in files) > 40
    assert sum(name.startswith("rejects/") for name in files) > 20
    for source in made[2].splits["train"].sources:
        assert set(source.dropped) >= {
            "length: too short",
            f"exact_duplicate: {source.name}",
            f"near_duplicate: {source.name}",
        }
    prepare_at(tmp_path / "other", tmp_path, sources=sources, workers=1, shard_tokens=1200, **CLEAN)
    other = contents(tmp_path / "other")
    assert other["tokenizer.json"] == files["tokenizer.json"]
    same = [name for name in files if name.endswith(".bin") and other.get(name) == files[name]]
    assert len(same) < 10


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_never_decreases_and_ends_each_stage_at_its_total(
    tmp_path: Path, sources: tuple[SourceConfig, ...], prepare_at: Prepare, workers: int
) -> None:
    size = sum(Path(source.paths[0]).stat().st_size for source in sources)
    for stop_at in ("cleaning", "tokenizing", None):  # None: the last attempt, which continues from the others
        seen: list[StageProgress] = []

        def on_progress(
            progress: StageProgress, stop_at: str | None = stop_at, seen: list[StageProgress] = seen
        ) -> None:
            seen.append(progress)
            if progress.stage == stop_at and progress.read > size / 2:
                raise KeyboardInterrupt

        if stop_at is None:
            made = prepare_at(
                tmp_path / "data", tmp_path, sources=sources, workers=workers, progress=on_progress, **CLEAN
            )
        else:
            with pytest.raises(KeyboardInterrupt):
                prepare_at(tmp_path / "data", tmp_path, sources=sources, workers=workers, progress=on_progress, **CLEAN)
        stages = list(dict.fromkeys(progress.stage for progress in seen))
        assert (
            stages
            == {
                "cleaning": ["cleaning"],
                "tokenizing": [
                    "cleaning",
                    "comparing documents",
                    "reading a sample",
                    "counting words",
                    "training the tokenizer",
                    "tokenizing",
                ],
                None: ["cleaning", "tokenizing"],  # the comparison and the tokenizer are finished already
            }[stop_at]
        )
        for stage in stages:
            own = [progress for progress in seen if progress.stage == stage]
            for before, after in pairwise(own):
                assert (before.documents, before.tokens, before.read) <= (after.documents, after.tokens, after.read)
                assert before.read <= after.read
            if stage not in (stop_at, "training the tokenizer"):
                assert own[-1].read == own[-1].total
    ends = {progress.stage: progress for progress in seen}
    tokens = sum(manifest.tokens for manifest in made.splits.values())
    assert ends["tokenizing"] == StageProgress("tokenizing", 420, tokens, size, size)
    assert ends["cleaning"] == StageProgress("cleaning", 420, 0, size, size)


def test_a_worker_holds_one_chunk_at_a_time(tmp_path: Path, prepare_at: Prepare) -> None:
    source = SourceConfig(kind="jsonl", paths=(str(tmp_path / "x.jsonl"),))
    write_jsonl(tmp_path / "x.jsonl", 1500, 0)
    tokenizer = prepare_at(tmp_path / "data", tmp_path, sources=[source], shard_tokens=100_000).path / "tokenizer.json"
    work = tmp_path / "work"
    for name in ("train", "validation", "done"):
        (work / name).mkdir(parents=True)

    def peak(shard_tokens: int, n_chunks: int) -> int:
        """Return the peak bytes that Python and NumPy hold while that many chunks are done."""
        config = PrepareConfig(sources=(source,), shard_tokens=shard_tokens)
        setup = TokenizeSetup(
            config, work, work / "done", tokenizer, load_tokenizer(tokenizer).fingerprint, keep_rejects=False
        )
        do = init_worker(setup)
        chunks = find_corpus(config).chunks[:n_chunks]
        assert len(chunks) == n_chunks
        tracemalloc.start()
        for chunk in chunks:
            do(TokenizeJob(chunk, 0.1, None, str(shard_tokens)), lambda _: None)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(5000, 1)  # loads everything that stays in memory
    few, many, large = peak(5000, 3), peak(5000, 30), peak(40_000, 3)
    assert many < 1.3 * few
    assert large > 1.3 * few


@dataclass(frozen=True)
class Sleep:
    """A job that writes its process id to a file, waits, and then does what `then` says."""

    number: int
    folder: Path
    seconds: float = 0.0
    then: str = ""

    @property
    def name(self) -> str:
        return f"job {self.number}"


def setup_sleeping(start: int) -> Callable[[Sleep, ProgressCallback], int]:
    begun = os.getpid()

    def do(job: Sleep, report: ProgressCallback) -> int:
        (job.folder / str(os.getpid())).touch()
        assert os.getpid() == begun
        time.sleep(job.seconds)
        if job.then == "raise":
            raise DataError(f"{job.name} is wrong")
        if job.then == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(100):
            report(Progress(documents=1, read=job.number, tokens=2))
        return start + job.number

    return do


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(folder: Path) -> list[int]:
    return [int(file.name) for file in folder.iterdir()]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_runs_once_and_all_progress_is_reported(tmp_path: Path, workers: int) -> None:
    reported: list[Progress] = []
    jobs = [Sleep(number, tmp_path) for number in range(40)]
    results = list(run_jobs(partial(setup_sleeping, 1000), jobs, workers, reported.append))
    assert sorted(results) == list(range(1000, 1040))
    assert sum(reported, Progress()) == Progress(documents=4000, read=100 * sum(range(40)), tokens=8000)
    assert pids(tmp_path) == [os.getpid()] if workers == 1 else os.getpid() not in pids(tmp_path)
    assert not any(is_alive(pid) for pid in pids(tmp_path) if pid != os.getpid())


def test_only_a_few_jobs_are_submitted_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def state(job: Sleep) -> dict[str, object]:
        sent.append(job.number)
        return job.__dict__

    monkeypatch.setattr(Sleep, "__getstate__", state)
    ahead = 0
    for done, _ in enumerate(
        run_jobs(partial(setup_sleeping, 0), [Sleep(i, tmp_path) for i in range(60)], 2, lambda _: None)
    ):
        ahead = max(ahead, len(sent) - done)
    assert sorted(sent) == list(range(60))
    assert ahead <= 5


@pytest.mark.parametrize(
    ("then", "message"), [("raise", "job 3 is wrong"), ("die", r"worker process died while .*lower data\.workers")]
)
def test_if_one_job_fails_the_others_end_at_once(tmp_path: Path, then: str, message: str) -> None:
    jobs = [
        Sleep(0, tmp_path, FOREVER),
        *(Sleep(i, tmp_path) for i in (1, 2)),
        Sleep(3, tmp_path, 0.0, then),
        Sleep(4, tmp_path, FOREVER),
    ]
    with pytest.raises(DataError, match=message):
        list(run_jobs(partial(setup_sleeping, 0), jobs, 2, lambda _: None))
    assert len(pids(tmp_path)) == 2
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_closing_the_results_stops_the_workers(tmp_path: Path) -> None:
    jobs = [Sleep(0, tmp_path, FOREVER), Sleep(1, tmp_path), Sleep(2, tmp_path, FOREVER)]
    results: Iterator[int] = run_jobs(partial(setup_sleeping, 0), jobs, 2, lambda _: None)
    assert next(results) == 1
    results.close()  # type: ignore[attr-defined]  # it is a generator
    assert len(pids(tmp_path)) == 2
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_without_jobs_setup_is_not_called() -> None:
    def setup() -> Callable[[int, ProgressCallback], int]:
        raise AssertionError("begun")

    assert list(run_jobs(setup, [], 4, lambda _: None)) == []
    with pytest.raises(AssertionError, match="begun"):  # with a job, setup is called
        list(run_jobs(setup, [1], 4, lambda _: None))
