import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import hashing
from data_pipeline.cleaning import decontaminate
from data_pipeline.cleaning.decontaminate import EvaluationNgrams, evaluation_hash
from data_pipeline.errors import DataError
from data_pipeline.settings import DecontaminateConfig

QUESTION = (
    "Which of the following planets, seen from Earth, crosses the disc of the Sun about thirteen times in a century?"
)
WORDS = QUESTION.split()


def load(*paths: Path, **settings: Any) -> EvaluationNgrams:
    found = EvaluationNgrams.load(DecontaminateConfig(paths=tuple(map(str, paths)), **settings))
    assert found is not None
    return found


def write(file: Path, *texts: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps({"question": text}) + "\n" for text in texts) if file.suffix == ".jsonl" else " ".join(texts)
    )
    return file


def hits(evaluation: EvaluationNgrams, *texts: str) -> list[bool]:
    return [bool(hit) for hit in evaluation.find_contaminated(texts)]


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not(tmp_path: Path) -> None:
    evaluation = load(write(tmp_path / "a.txt", QUESTION))
    before, after = "some words of its own ", " and some that come after"
    for start in range(len(WORDS) - 12):
        thirteen, twelve = WORDS[start : start + 13], WORDS[start : start + 12]
        assert hits(
            evaluation, before + " ".join(thirteen) + after, before + " ".join(twelve) + after, "", " ".join(twelve)
        ) == [*(True, False, False, False)]
    gap = [*WORDS[:7], "oddly", *WORDS[7:13]]
    assert hits(evaluation, " ".join(gap), " ".join(reversed(WORDS)), "nothing of the kind") == [False, False, False]


def test_case_punctuation_and_line_breaks_hide_nothing(tmp_path: Path) -> None:
    evaluation = load(write(tmp_path / "a.txt", QUESTION))
    disguised = " \u2014 ".join(f"\u201c{word.upper()}\u201d" for word in WORDS)
    assert hits(evaluation, disguised, "\n* ".join(WORDS), QUESTION.replace(" ", ""), "\u4e2d\u6587" + disguised) == [
        True,
        True,
        False,
        True,
    ]


def test_every_string_in_jsonl_and_parquet_counts_however_deep(tmp_path: Path) -> None:
    sentences = [f"number {i} " + " ".join(f"w{i}x{j}" for j in range(12)) for i in range(5)]
    rows = [
        {"id": 7, "question": sentences[0], "choices": {"text": [sentences[1], "yes"], "right": None}},
        {"id": 8, "question": "", "choices": {"text": [sentences[2]], "right": 0}},
    ]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pq.write_table(
        pa.table({"x": [1], "text": [sentences[3]], "many": [[sentences[4]]]}), tmp_path / "deep" / "b.parquet"
    )
    (tmp_path / "deep" / "README.md").write_text(QUESTION)
    evaluation = load(tmp_path)
    assert hits(evaluation, *sentences, QUESTION) == [True, True, True, True, True, False]
    assert (evaluation.n_texts, evaluation.n_ngrams, evaluation.n_too_short) == (5, 10, 1)
    assert hits(load(tmp_path / "*" / "*.parquet"), *sentences) == [False, False, False, True, True]


def test_shorter_texts_are_compared_as_a_whole_from_eight_words_on(tmp_path: Path) -> None:
    seven, eight, nine = (" ".join(f"n{length}w{i}" for i in range(length)) for length in (7, 8, 9))
    evaluation = load(write(tmp_path / "a.jsonl", seven, eight, nine, QUESTION, ""))
    assert (evaluation.n_texts, evaluation.n_too_short, evaluation.n_ngrams) == (3, 1, 2 + len(WORDS) - 12)
    assert evaluation.lengths == (8, 9, 13)
    assert hits(evaluation, f"well, {seven}", f"well, {eight}!", f"{nine}.", nine.rsplit(" ", 1)[0]) == [
        False,
        True,
        True,
        False,
    ]


def test_documents_longer_than_a_batch_are_searched_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = load(write(tmp_path / "a.txt", QUESTION))
    monkeypatch.setattr(hashing, "BATCH_CHARACTERS", 64)
    for before in range(0, 200, 3):
        filler = " ".join(f"f{i}" for i in range(before))
        long, none = f"{filler} {QUESTION} {filler}", f"{filler} {' '.join(WORDS[:12])} {filler}"
        assert hits(evaluation, "short", long, "short", none) == [False, True, False, False]
    assert load(tmp_path / "a.txt").n_texts == 1
    assert load(tmp_path / "a.txt").n_ngrams == evaluation.n_ngrams


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=20), min_size=1, max_size=5),
    st.lists(st.lists(st.sampled_from("abcd"), max_size=30), max_size=5),
    st.integers(1, 4),
)
def test_contaminated_texts_are_those_that_share_word_sets(
    tmp_path_factory: pytest.TempPathFactory, given_texts: list[list[str]], documents: list[list[str]], n: int
) -> None:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    looked_for = set().union(*map(runs, given_texts))
    file = write(tmp_path_factory.mktemp("given") / "a.jsonl", *map(" ".join, given_texts))
    if not looked_for:
        with pytest.raises(DataError, match="none of the texts"):
            load(file, ngram=n)
        return
    evaluation = load(file, ngram=n)
    assert evaluation.n_ngrams == len(looked_for)
    assert hits(evaluation, *map(" ".join, documents)) == [bool(runs(words) & looked_for) for words in documents]


def test_decontamination_is_off_without_paths() -> None:
    assert EvaluationNgrams.load(DecontaminateConfig()) is None
    assert evaluation_hash(DecontaminateConfig()) == ""


def test_the_hash_depends_on_the_contents_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(*paths: Path) -> str:
        return evaluation_hash(DecontaminateConfig(paths=tuple(map(str, paths))))

    one, two = (
        write(tmp_path / "a.jsonl", QUESTION, " ".join(WORDS[::-1])),
        write(tmp_path / "b.txt", QUESTION + " Venus"),
    )
    before = hashed(one, two)
    monkeypatch.setattr(decontaminate, "TEXTS_PER_BATCH", 1)
    assert hashed(two, one) == before != hashed(one)
    write(two, QUESTION + " Mercury")
    assert hashed(one, two) != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "none does not exist or matches no file"),
        ("*.txt", None, r"\*.txt does not exist or matches no file"),
        ("a.csv", b"text", r"a.csv holds no file that ends with .txt, .jsonl, .parquet"),
        ("a.jsonl", b'{"a": "b"}\n{"a": \n', r"cannot read .*a.jsonl: broken JSON in line 2"),
        ("a.parquet", b"PAR1 or not", "cannot read .*a.parquet"),
        ("a.txt", b"too few words", "none of the texts in .*a.txt has 8 words .1 have fewer"),
    ],
)
def test_an_unreadable_path_is_named_with_its_setting(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^data.decontaminate.paths: .*{message}") as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.txt", QUESTION.encode("utf-16")),
        ("a.txt.gz", gzip.compress(QUESTION.encode())),
        ("a.txt", zstandard.compress(QUESTION.encode())),
        ("a.jsonl.gz", gzip.compress(json.dumps({"q": QUESTION}).encode())),
        ("a.jsonl.zst", zstandard.compress(json.dumps([QUESTION]).encode())),
        ("a.jsonl", b"\xef\xbb\xbf" + json.dumps({"q": QUESTION}).encode()),
    ],
)
def test_evaluation_texts_are_found_compressed_and_in_other_encodings(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    assert hits(load(tmp_path), QUESTION, "nothing of the kind") == [True, False]


def test_evaluation_texts_behind_links_and_in_columns_of_equal_name_are_found(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array([QUESTION]), pa.array([" ".join(reversed(WORDS))])], names=["text", "text"])
    (tmp_path / "blobs").mkdir()
    pq.write_table(twice, tmp_path / "blobs" / "1a")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "x.parquet").symlink_to("../blobs/1a")
    for entry in (tmp_path / "sets", tmp_path / "sets" / "*.parquet"):
        assert hits(load(entry), QUESTION, " ".join(reversed(WORDS)), "nothing of the kind") == [True, True, False]
    (tmp_path / "sets" / "x.txt").symlink_to("gone")
    with pytest.raises(DataError, match=r"^data\.decontaminate\.paths: .*/sets/x\.txt is a broken link"):
        load(tmp_path / "sets")


def test_a_broken_link_that_would_not_be_read_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(QUESTION)
    for name in (".#a.txt", "latest", "old.json"):  # `.#a.txt` is an editor's lock file
        (tmp_path / name).symlink_to("gone")
    assert load(tmp_path).skipped_files == "2 files (1 .json, 1 without an ending), latest and old.json"


def test_skipped_evaluation_files_are_reported(tmp_path: Path) -> None:
    for name in ("a.txt", "b.json", "c.JSONL", "d.parquet.gz", ".DS_Store"):
        (tmp_path / name).write_text(QUESTION)
    assert (
        load(tmp_path).skipped_files == "3 files (1 .JSONL, 1 .json, 1 .parquet.gz), b.json, c.JSONL and d.parquet.gz"
    )
    assert load(tmp_path / "a.txt").skipped_files is None


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (
            "a.txt",
            "Größe Äpfel übermüdet".encode("latin-1") * 9,
            r"cannot read .*a\.txt: it is not UTF-8, so it would match nothing",
        ),
        ("a.txt", b"%PDF-1.4\n", r"a\.txt is a PDF document, not text"),
        (
            "a.jsonl",
            json.dumps({"q": QUESTION}).encode("utf-16"),
            r"a\.jsonl: broken JSON in line 1 .*; it is UTF-16: convert it",
        ),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl: broken JSON in line 1 \(maximum recursion"),
        ("a.parquet", b"ARROW1\0\0" + bytes(99), r"a\.parquet: .*; it is an Arrow file$"),
        ("a.txt.gz", gzip.compress(QUESTION.encode())[:-9], r"cannot read .*a\.txt\.gz: Compressed file ended"),
    ],
)
def test_an_evaluation_file_of_another_kind_is_reported(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=f"^data.decontaminate.paths: .*{message}"):
        load(tmp_path)
