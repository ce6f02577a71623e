"""Damaged prepared data, tokens without their tokenizer, and difficult texts."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attempts import Text, prepare_here, write_text

from data_pipeline.errors import DataError
from data_pipeline.reading.loader import Loader
from data_pipeline.reading.packing import NO_LABEL
from data_pipeline.settings import SourceConfig
from data_pipeline.storage.manifest import BLOCK_BYTES, DTYPES
from data_pipeline.storage.prepared import PreparedData, open_prepared
from data_pipeline.storage.shards import OpenedSplit, open_split
from data_pipeline.storage.verify import verify
from data_pipeline.tokenizing.tokenizer import load_tokenizer

Prepare = Callable[..., PreparedData]
WriteSplit = Callable[..., OpenedSplit]
RandomDocuments = Callable[..., list[list[int]]]


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.write_bytes(raw)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return write_text(tmp_path_factory.mktemp("short"), 100)


class TestText:
    """Texts with unusual contents."""

    def test_an_end_of_text_token_in_the_text_does_not_end_a_document(
        self, tmp_path: Path, prepare_at: Prepare
    ) -> None:
        texts = [
            "<|endoftext|>",
            "a<|endoftext|>b",
            "<|endoftext|><|endoftext|>" * 100,
            "<|end",
            "oftext|>",
            "the end<|endoftext|>",
        ] * 5
        (tmp_path / "x.jsonl").write_text(
            "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(texts))
        )
        source = SourceConfig(kind="jsonl", paths=(str(tmp_path / "x.jsonl"),))
        made = prepare_at(tmp_path / "data", tmp_path, sources=[source], validation_fraction=0.0)
        shards = open_split(made.path / "train").sources[0]
        tokens = shards.tokens(0, shards.n_tokens)
        assert np.count_nonzero(tokens == made.tokenizer.eot_id) == shards.n_documents == 30
        spans = [shards.document_span(i) for i in range(30)]
        decoded = {made.tokenizer.decode(shards.tokens(start, stop - 1).tolist()) for start, stop in spans}
        assert decoded == {f"{text} {i}" for i, text in enumerate(texts)}

    def test_invalid_bytes_are_replaced_and_counted_and_empty_documents_dropped_and_counted(
        self, tmp_path: Path, prepare_at: Prepare
    ) -> None:
        rows = [b'{"text": "caf\xe9 %d"}' % i for i in range(7)] + [b'{"text": "\\ud800 %d"}' % i for i in range(4)]
        rows += [b'{"text": ""}', b'{"text": null}', b'{"text": " \\n\\u00a0"}'] * 3
        (tmp_path / "x.jsonl").write_bytes(b"\n".join(rows))
        source = SourceConfig(kind="jsonl", paths=(str(tmp_path / "x.jsonl"),))
        for name, settings in (("plain", {}), ("cleaned", {"dedup": {"exact": True}})):
            made = (
                prepare_at(tmp_path / name, tmp_path, sources=[source], validation_fraction=0.0, **settings)
                .splits["train"]
                .sources[0]
            )
            assert (made.documents, made.repaired, made.dropped) == (11, {"invalid Unicode": 11}, {"empty": 9})

    def test_a_file_name_that_is_not_unicode_can_be_an_id(self, tmp_path: Path, prepare_at: Prepare) -> None:
        folder = tmp_path / "text"
        folder.mkdir()
        for i in range(8):
            (folder / os.fsdecode(b"caf\xe9%d.txt" % i)).write_text(
                "too short" if i == 3 else f"long enough to be kept, number {i}"
            )
        made = prepare_at(
            tmp_path / "data",
            folder,
            filters={"apply": ["length"], "length": {"min_characters": 20}},
            keep_rejects=True,
        )
        assert sum(split.documents for split in made.splits.values()) == 7
        assert len(list((tmp_path / "data" / "rejects").iterdir())) == 1


class TestDamage:
    """Damaged prepared data."""

    @pytest.fixture
    def split(self, write_split: WriteSplit, random_documents: RandomDocuments) -> OpenedSplit:
        """A split of one shard with three blocks."""
        return write_split({"web": random_documents(6000, 460)}, shard_tokens=10**7)

    def test_a_flipped_bit_is_reported_with_its_block(self, split: OpenedSplit) -> None:
        file = split.folder / "web-00000.bin"
        assert file.stat().st_size > 2 * BLOCK_BYTES
        loader = Loader(split.folder, seq_len=1024, seed=0)
        undamaged = loader.batch(0, loader.n_sequences)
        flip(file, BLOCK_BYTES + 12345)
        assert verify(split.folder).problems == (f"{file}: block 1 of 3 does not match its checksum",)
        itemsize = DTYPES[split.manifest.sources[0].dtype].itemsize
        touched = {
            j
            for j in range(loader.n_sequences)
            if j * 1024 * itemsize < 2 * BLOCK_BYTES and (j + 1) * 1024 * itemsize >= BLOCK_BYTES
        }
        with pytest.raises(DataError, match=rf"{file} is damaged: block 1 of 3 \(1 MiB from byte {BLOCK_BYTES}\)"):
            Loader(split.folder, seq_len=1024, seed=0).batch(0, loader.n_sequences)
        batch = Loader(split.folder, seq_len=1024, seed=0, on_damage="skip").batch(0, loader.n_sequences)
        left_out = (batch.labels == NO_LABEL).all(axis=1)
        assert len(batch.damaged) == np.count_nonzero(left_out) == len(touched) >= 512
        assert all("web-00000.bin is damaged: block 1 of 3" in message for message in batch.damaged)
        assert (batch.input_ids[left_out] == split.manifest.eot_id).all()
        for ours, theirs in (
            (batch.input_ids, undamaged.input_ids),
            (batch.labels, undamaged.labels),
            (batch.document_ids, undamaged.document_ids),
        ):
            assert (ours[~left_out] == theirs[~left_out]).all()

    @pytest.mark.parametrize("ending", ["bin", "idx"])
    def test_a_truncated_or_missing_shard_is_reported_before_training(self, split: OpenedSplit, ending: str) -> None:
        file = split.folder / f"web-00000.{ending}"
        Loader(split.folder, seq_len=1024, seed=0)
        raw = file.read_bytes()
        file.write_bytes(raw[:-2])
        with pytest.raises(
            DataError, match=rf"{file} has {len(raw) - 2} bytes where the manifest says {len(raw)}; restore it"
        ):
            Loader(split.folder, seq_len=1024, seed=0, on_damage="skip")
        assert any(str(file) in problem for problem in verify(split.folder).problems)
        file.unlink()
        with pytest.raises(DataError, match=rf"{file} is missing"):
            Loader(split.folder, seq_len=1024, seed=0, on_damage="skip")
        assert any(str(file) in problem for problem in verify(split.folder).problems)


class TestOtherTokenizer:
    """Tokens mean nothing without their tokenizer."""

    def test_a_swapped_tokenizer_is_detected(self, tmp_path: Path, short: Text) -> None:
        prepare_here(tmp_path / "one", short.jsonl)
        other = prepare_here(tmp_path / "two", short.jsonl, vocab_size=290).path
        (tmp_path / "one" / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
        with pytest.raises(
            DataError,
            match=r"tokenizer\.json is not the tokenizer that made .*train; restore it from a copy, or prepare",
        ):
            open_prepared(tmp_path / "one")
        with pytest.raises(DataError, match="is not the tokenizer that made"):
            prepare_here(tmp_path / "one", short.jsonl)
        assert any("tokenizer.json did not make" in problem for problem in verify(tmp_path / "one").problems)

    def test_prepared_tokens_of_another_tokenizer_are_refused(self, tmp_path: Path, short: Text) -> None:
        one, two = (prepare_here(tmp_path / str(size), short.jsonl, vocab_size=size).path for size in (300, 290))
        fingerprints = [load_tokenizer(path).fingerprint for path in (one, two)]
        sources = [SourceConfig(kind="prepared", paths=(str(one),))]
        with pytest.raises(
            DataError,
            match=rf"a manifest of another tokenizer: {fingerprints[0]}, .* is {fingerprints[1]}; set data\.tokenizer",
        ):
            prepare_here(tmp_path / "both", short.jsonl, sources=sources, tokenizer=two)
        assert not (tmp_path / "both").exists()
        imported = prepare_here(tmp_path / "both", short.jsonl, sources=sources, tokenizer=one)
        assert imported.splits["train"].tokens == open_prepared(one).splits["train"].tokens
