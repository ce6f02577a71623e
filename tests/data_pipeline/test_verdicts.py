"""Verdicts are read exactly as they were written, or not at all."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from data_pipeline.cleaning.verdicts import ChunkVerdicts, TextsHash, encode_reasons, read_verdicts, write_verdicts


def verdicts(*reasons: str | None) -> ChunkVerdicts:
    codes, table = encode_reasons(reasons)
    return ChunkVerdicts(codes, table, np.arange(len(reasons)) % 2 == 1, texts="texts", signatures="", key="key")


def reasons_of(found: ChunkVerdicts) -> list[str | None]:
    return [found.drop_reason(i) for i in range(len(found.codes))]


def test_verdicts_are_read_back_and_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    written, file = verdicts(None, "empty", "c4: short", None, "empty"), tmp_path / "a.verdicts"
    write_verdicts(file, written)
    read = read_verdicts(file)
    assert read is not None
    assert reasons_of(read) == [None, "empty", "c4: short", None, "empty"]
    for field in fields(ChunkVerdicts):
        assert np.array_equal(getattr(read, field.name), getattr(written, field.name))
    raw = file.read_bytes()
    for byte in range(len(raw)):
        file.write_bytes(raw[:byte] + bytes([raw[byte] ^ 4]) + raw[byte + 1 :])
        assert read_verdicts(file) is None
    assert read_verdicts(tmp_path / "none") is None


def test_a_chunk_without_documents_has_no_verdicts(tmp_path: Path) -> None:
    write_verdicts(tmp_path / "a", verdicts())
    read = read_verdicts(tmp_path / "a")
    assert read is not None
    assert reasons_of(read.with_reasons(np.zeros(0, np.uint8), (None, "late"))) == []


def test_a_later_reason_applies_only_to_kept_documents() -> None:
    late = (None, "exact: a", "exact: b", "near: a")
    found = verdicts(None, "empty", None, "c4", None)
    assert reasons_of(found.with_reasons(np.array([0, 0, 3, 2, 1], np.uint8), late)) == [
        None,
        "empty",
        "near: a",
        "c4",
        "exact: a",
    ]
    assert reasons_of(found.with_reasons(np.array([2, 2, 2, 2, 2], np.uint8), late)) == [
        "exact: b",
        "empty",
        "exact: b",
        "c4",
        "exact: b",
    ]
    assert reasons_of(found.with_reasons(np.zeros(5, np.uint8), late)) == reasons_of(found)


def test_the_digest_changes_with_every_verdict_and_with_the_texts() -> None:
    base = verdicts(None, "empty", None)
    others = [
        verdicts(None, None, None),
        verdicts(None, "long", None),
        verdicts("empty", None, None),
        replace(base, texts="others"),
    ]
    others.append(replace(base, marks=~base.marks))
    assert len({other.digest() for other in others} | {base.digest()}) == 6
    assert replace(base, key="another").digest() == base.digest()


def test_the_hash_of_texts_is_not_that_of_their_concatenation() -> None:
    digests = set()
    for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"], []):
        texts_hash = TextsHash()
        for text in texts:
            texts_hash.add(text)
        digests.add(texts_hash.hexdigest())
    assert len(digests) == 6
