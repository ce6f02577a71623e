import gzip
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel

from data_pipeline.errors import DataError
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.manifest import BLOCK_BYTES, MANIFEST, Recipe, SourceManifest, SplitManifest
from data_pipeline.storage.shard_writer import write_shard
from data_pipeline.storage.shards import ShardSet, open_split
from data_pipeline.storage.tokenized import describe_tokenized_source, import_tokenized
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer
from data_pipeline.workers import Progress

DATATROVE = Path(__file__).parent / "fixtures/datatrove"
LENGTHS = (5, 1, 64, 17, 2, 33, 128, 9)

Documents = list[list[int]]


def fixture_documents(vocab_size: int) -> Documents:
    """Return the documents of the recorded fixtures, as their README.md files describe them."""
    return [
        [(7919 * i + 104_729 * k) % (vocab_size - 1) + 1 for k in range(n - 1)] + [0] for i, n in enumerate(LENGTHS)
    ]


def make_tokenizer(folder: Path, vocab_size: int = 1000) -> Tokenizer:
    """Make a tokenizer that only has an end-of-text token and a highest id. It is never used to encode."""
    backend = tokenizers.Tokenizer(WordLevel({"<|endoftext|>": 0, "last": vocab_size - 1}, unk_token="last"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path)


def write_datatrove(file: Path, documents: Documents, dtype: str = "<u2") -> None:
    np.array(list(itertools.chain(*documents)), dtype).tofile(file)
    np.cumsum([len(ids) for ids in documents], dtype="<u8").tofile(f"{file}.index")


def read(folder: Path, source: SourceManifest | None) -> Documents:
    """Read the documents of a source in one split."""
    if source is None:
        return []
    shards = ShardSet(folder, source)
    return [shards.tokens(*shards.document_span(i)).tolist() for i in range(shards.n_documents)]


def import_documents(
    work: Path, source: SourceConfig, tokenizer: Tokenizer, fraction: float = 0.0
) -> tuple[Documents, Documents]:
    """Import a source; return (documents for training, held-out documents)."""
    parts = import_tokenized(source, "other", tokenizer, work, fraction)
    return read(work / "train", parts["train"]), read(work / "validation", parts.get("validation"))


def write_prepared(
    path: Path, splits: dict[str, dict[str, Documents]], tokenizer: Tokenizer, **counts: dict[str, int]
) -> None:
    given = {"dropped": {}, "repaired": {}, "marked": {}} | counts
    for split, sources in splits.items():
        (path / split).mkdir(parents=True)
        manifests = []
        for name, documents in sources.items():
            tokens, lengths = np.array(list(itertools.chain(*documents))), np.array(list(map(len, documents)), np.int32)
            shards = (write_shard(path / split, f"{name}-00000", tokens, lengths, "uint16"),)
            sums = {"documents": len(documents), "tokens": len(tokens), "text_bytes": 100}
            manifests.append(
                SourceManifest(name=name, dtype="uint16", ends_with_eot=True, shards=shards, **sums, **given)
            )
        write_manifest(path / split, tuple(splits), manifests, tokenizer)


def write_manifest(
    folder: Path, splits: tuple[str, ...], sources: Sequence[SourceManifest], tokenizer: Tokenizer
) -> None:
    recipe = Recipe(settings=PrepareConfig(), trained_tokenizer=False, listings=(), lists="", made_with={})
    ids = {"vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eot_id, "tokenizer": tokenizer.fingerprint}
    manifest = SplitManifest(split=folder.name, splits=splits, recipe=recipe, sources=tuple(sources), **ids)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())


@pytest.mark.parametrize(("name", "vocab_size"), [("uint16", 1000), ("uint32", 128_256)])
def test_files_of_datatrove_are_read_exactly(tmp_path: Path, name: str, vocab_size: int) -> None:
    source = SourceConfig(kind="datatrove", paths=(f"{DATATROVE}/{name}_*.ds",))
    documents = fixture_documents(vocab_size)
    order = np.random.default_rng(0).permutation(len(documents))  # datatrove shuffled them with this seed
    train, held_out = import_documents(tmp_path, source, make_tokenizer(tmp_path, vocab_size))
    assert train == [documents[i] for i in order]
    assert held_out == []


def test_no_token_is_copied_and_progress_counts_every_byte_token_and_document(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (file,) = DATATROVE.glob("uint16_*.ds")
    reported: list[Progress] = []
    parts = import_tokenized(
        SourceConfig(kind="datatrove", paths=(str(file),)), "other", tokenizer, tmp_path, 0.3, reported.append
    )
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.suffix not in (".json", "")] == ["other-00000.idx"] * 2
    assert {shard.external_bin for part in parts.values() for shard in part.shards} == {str(file)}
    assert sum(reported, Progress()) == Progress(documents=8, read=file.stat().st_size, tokens=sum(LENGTHS))


def test_documents_without_an_end_of_text_token_are_detected_and_empty_ones_counted(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    parts = import_tokenized(
        SourceConfig(kind="datatrove", paths=(str(DATATROVE / "unended_00000.ds"),)), "x", tokenizer, tmp_path, 0.0
    )
    documents = fixture_documents(1000)
    assert read(tmp_path / "train", parts["train"]) == [ids[:-1] if i == 3 else ids for i, ids in enumerate(documents)]
    assert not parts["train"].ends_with_eot
    assert parts["train"].dropped == {"empty": 1}
    complete = import_tokenized(
        SourceConfig(kind="datatrove", paths=(f"{DATATROVE}/uint16_*.ds",)), "x", tokenizer, tmp_path, 0.0
    )
    assert complete["train"].ends_with_eot
    assert complete["train"].dropped == {}


@pytest.mark.parametrize("unended", [None, 0, 1, 2, 3])
def test_a_missing_end_of_text_is_found_at_any_block_boundary(
    tmp_path: Path, tokenizer: Tokenizer, unended: int | None
) -> None:
    half = BLOCK_BYTES // 2  # tokens in a block
    # One document ends exactly at a block's end. Another begins one token later and fills more than a block.
    documents = [[1] * (half - 1) + [0], [0], [2] * (half + 7) + [0], [3] * 99 + [0]]
    if unended is not None:
        documents[unended][-1] = 5
    write_datatrove(tmp_path / "x.ds", documents)
    part = import_tokenized(SourceConfig(kind="datatrove", paths=(str(tmp_path),)), "x", tokenizer, tmp_path, 0.0)[
        "train"
    ]
    assert part.ends_with_eot == (unended is None)
    assert read(tmp_path / "train", part) == documents


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.05, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("sizes", [(1,), (2,), (40,), (3, 1, 2), (1, 1, 1), (5, 0, 30, 0), (0, 1)])
def test_the_last_documents_up_to_the_fraction_are_held_out(
    tmp_path: Path, tokenizer: Tokenizer, sizes: Sequence[int], fraction: float
) -> None:
    rng = np.random.default_rng(sum(sizes))
    documents = [[*rng.integers(1, 1000, rng.integers(0, 30)).tolist(), 0] for _ in range(sum(sizes))]
    rest = iter(documents)
    for i, size in enumerate(sizes):
        write_datatrove(tmp_path / f"{i}.ds", list(itertools.islice(rest, size)))
    train, held_out = import_documents(
        tmp_path, SourceConfig(kind="datatrove", paths=(str(tmp_path),)), tokenizer, fraction
    )
    ends = np.cumsum([len(ids) for ids in reversed(documents)])
    fitting = int(np.searchsorted(ends, fraction * ends[-1], side="right"))
    expected = max(fitting, 1) if fraction and len(documents) > 1 else 0
    assert train + held_out == documents
    assert len(held_out) == expected


def test_folder_glob_and_file_are_equivalent_and_pattern_and_exclude_apply(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "in").mkdir()
    for name in "bac":
        write_datatrove(tmp_path / f"in/{name}.ds", [[ord(name), 0]])
    ways = [
        (str(tmp_path / "in"),),
        (f"{tmp_path}/in/*",),
        (f"file://{tmp_path}/in/*.ds",),
        tuple(f"{tmp_path}/in/{x}.ds" for x in "abc"),
    ]
    for paths in ways:
        assert import_documents(tmp_path, SourceConfig(kind="datatrove", paths=paths), tokenizer)[0] == [
            [97, 0],
            [98, 0],
            [99, 0],
        ]
    some = SourceConfig(kind="datatrove", paths=ways[0], pattern="[ab].ds", exclude=("b.*",))
    assert import_documents(tmp_path, some, tokenizer)[0] == [[97, 0]]
    assert describe_tokenized_source(some).startswith("1 files, 4 bytes, ")
    assert describe_tokenized_source(some) != describe_tokenized_source(SourceConfig(kind="datatrove", paths=ways[0]))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("how", ["metadata", "scan", "header"])
def test_raw_arrays_of_olmo_with_metadata_without_and_with_a_numpy_header(
    tmp_path: Path, tokenizer: Tokenizer, dtype: str, how: str
) -> None:
    documents = fixture_documents(1000)
    ids = np.array(list(itertools.chain(*documents)), dtype)
    if how == "header":
        np.save(tmp_path / "x.npy", ids)
    else:
        ids.tofile(tmp_path / "x.npy")
    if how == "metadata":
        documents = [[*documents[0], *documents[1]], *documents[2:]]  # the tokens alone do not show this
        ends = np.cumsum([0, *map(len, documents)]).tolist()
        with gzip.open(tmp_path / "x.csv.gz", "wt") as stream:
            stream.writelines(f'{a},{b},"id, {a}",s3://bucket/x.json.gz,{a}\n' for a, b in itertools.pairwise(ends))
    source_dtype = "uint32" if how == "header" else dtype  # a NumPy header states the type
    train, held_out = import_documents(
        tmp_path, SourceConfig(kind="olmo", paths=(str(tmp_path),), dtype=source_dtype), tokenizer, 0.05
    )
    assert train == documents[:-1]
    assert held_out == documents[-1:]


def test_tokens_after_the_last_end_of_text_token_are_a_document_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    np.array([7, 0, 0, 8, 9], np.uint32).tofile(tmp_path / "x.npy")
    parts = import_tokenized(SourceConfig(kind="olmo", paths=(str(tmp_path / "x.npy"),)), "x", tokenizer, tmp_path, 0.0)
    assert read(tmp_path / "train", parts["train"]) == [[7, 0], [0], [8, 9]]
    assert not parts["train"].ends_with_eot


def test_prepared_data_is_imported_with_its_split_counts_and_checksums(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = fixture_documents(1000)
    prepared = tmp_path / "there"
    splits = {
        "train": {"web": documents[:3], "code": documents[3:6]},
        "validation": {"web": documents[6:7], "code": documents[7:]},
    }
    write_prepared(
        prepared, splits, tokenizer, dropped={"c4: too short": 2}, repaired={"UTF-8": 1}, marked={"contaminated": 3}
    )
    source = SourceConfig(kind="prepared", paths=(str(prepared),))
    parts = import_tokenized(source, "mine", tokenizer, tmp_path / "work", 0.5)
    train = parts["train"]
    assert read(tmp_path / "work/train", train) == documents[:6]
    assert read(tmp_path / "work/validation", parts["validation"]) == documents[6:]
    assert (train.documents, train.tokens, train.text_bytes, train.read) == (6, sum(LENGTHS[:6]), 200, 10)
    assert (train.dropped, train.repaired, train.marked) == ({"c4: too short": 4}, {"UTF-8": 2}, {"contaminated": 6})
    assert [shard.name for shard in train.shards] == ["mine-00000", "mine-00001"]
    imported_shard = open_split(prepared / "train").manifest.sources[1].shards[0]
    assert train.shards[1].bin_blocks_xxh3_64 == imported_shard.bin_blocks_xxh3_64
    # All documents of a single split's folder are for training.
    once = SourceConfig(kind="prepared", paths=(str(prepared / "train"), str(prepared / "validation")))
    assert import_documents(tmp_path / "again", once, tokenizer) == (documents, [])
    assert describe_tokenized_source(source) == describe_tokenized_source(once)
    assert open_split(prepared / "train").manifest.fingerprint() in describe_tokenized_source(source)


def test_imported_data_can_be_imported_again_and_the_tokens_stay_in_place(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = fixture_documents(1000)
    write_datatrove(tmp_path / "x.ds", documents)
    first, second = tmp_path / "first", tmp_path / "second"
    parts = import_tokenized(
        SourceConfig(kind="datatrove", paths=(str(tmp_path / "x.ds"),)), "one", tokenizer, first, 0.3
    )
    for split, part in parts.items():
        write_manifest(first / split, tuple(parts), [part], tokenizer)
    again = import_tokenized(SourceConfig(kind="prepared", paths=(str(first),)), "two", tokenizer, second, 0.0)
    assert read(second / "train", again["train"]) + read(second / "validation", again["validation"]) == documents
    assert {shard.external_bin for part in again.values() for shard in part.shards} == {str(tmp_path / "x.ds")}
    assert again["train"].text_bytes is None


@pytest.mark.parametrize("unended", [0, 7])
def test_each_split_has_its_own_ends_with_eot(tmp_path: Path, tokenizer: Tokenizer, unended: int) -> None:
    documents = fixture_documents(1000)
    documents[unended][-1] = 5
    write_datatrove(tmp_path / "x.ds", documents)
    parts = import_tokenized(
        SourceConfig(kind="datatrove", paths=(str(tmp_path / "x.ds"),)), "x", tokenizer, tmp_path, 0.01
    )
    assert parts["validation"].documents == 1
    assert (parts["train"].ends_with_eot, parts["validation"].ends_with_eot) == (unended != 0, unended != 7)


def test_a_manifest_of_another_tokenizer_and_a_damaged_index_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = tmp_path / "there"
    write_prepared(prepared, {"train": {"web": fixture_documents(1000)}}, tokenizer)
    source = SourceConfig(kind="prepared", paths=(str(prepared),))
    other = make_tokenizer(tmp_path, 999)
    with pytest.raises(
        DataError,
        match=f"a manifest of another tokenizer: {tokenizer.fingerprint}, where data.tokenizer is {other.fingerprint}",
    ):
        import_tokenized(source, "x", other, tmp_path / "work", 0.0)
    index = prepared / "train/web-00000.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"web-00000\.idx is damaged"):
        import_tokenized(source, "x", tokenizer, tmp_path / "work", 0.0)


@pytest.mark.parametrize(
    ("dtype", "bad", "reported"),
    [("<u2", 1000, "1000"), ("<u4", 2**31, "2147483648"), ("<u4", 2**32 - 1, "4294967295")],
)
def test_an_id_outside_of_the_vocabulary_is_reported(
    tmp_path: Path, tokenizer: Tokenizer, dtype: str, bad: int, reported: str
) -> None:
    write_datatrove(tmp_path / "x.ds", [[999, 0]], dtype)
    source = SourceConfig(kind="datatrove", paths=(str(tmp_path),))
    assert import_documents(tmp_path, source, tokenizer)[0] == [[999, 0]]
    write_datatrove(tmp_path / "x.ds", [[5, 0], [5, bad, 0]], dtype)
    with pytest.raises(DataError, match=rf"x\.ds: token {reported} is not in the vocabulary of 1000"):
        import_tokenized(source, "x", tokenizer, tmp_path, 0.0)


def test_tokens_read_in_place_are_verified_by_checksums(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_datatrove(tmp_path / "x.ds", [[5, 0], [6, 0]])
    part = import_tokenized(SourceConfig(kind="datatrove", paths=(str(tmp_path),)), "x", tokenizer, tmp_path, 0.0)[
        "train"
    ]
    raw = bytearray((tmp_path / "x.ds").read_bytes())
    raw[4] ^= 1
    (tmp_path / "x.ds").write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.ds is damaged: block 0 of 1"):
        ShardSet(tmp_path / "train", part).tokens(0, 4)


def damage(name: str) -> Callable[[Path], SourceConfig]:
    """Return a function that makes a folder with the named defect."""

    def make(folder: Path) -> SourceConfig:
        write_datatrove(folder / "x.ds", [[5, 0], [6, 0]])
        kind, olmo = "datatrove", folder / "y.npy"
        np.array([5, 0, 6, 0], np.uint32).tofile(olmo)
        if name == "cut":
            (folder / "x.ds").write_bytes((folder / "x.ds").read_bytes()[:-2])
        elif name == "no index":
            (folder / "x.ds.index").unlink()
        elif name == "falling index":
            np.array([3, 2, 4], "<u8").tofile(folder / "x.ds.index")
        elif name == "two types":
            write_datatrove(folder / "y.ds", [[7, 0]], "<u4")
        elif name == "nothing":
            write_datatrove(folder / "x.ds", [])
        elif name in ("odd", "no end", "wrong metadata", "broken metadata", "floats"):
            kind = "olmo"
            if name == "odd":
                olmo.write_bytes(olmo.read_bytes()[:-1])
            elif name == "no end":
                np.array([5, 6], np.uint32).tofile(olmo)
            elif name == "floats":
                np.save(olmo, np.zeros(4, np.float32))
            elif name == "broken metadata":
                (folder / "y.csv.gz").write_bytes(b"no gzip")
            else:
                (folder / "y.csv.gz").write_bytes(gzip.compress(b"0,2,a\n2,8,b\n"))
        return SourceConfig(kind=kind, paths=(str(folder),))

    return make


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", r"x\.ds\.index: 4 tokens by its last entry, but x\.ds has 6 bytes"),
        ("no index", r"cannot read .*x\.ds\.index: No such file"),
        ("falling index", r"x\.ds\.index: a document ends before it begins"),
        (
            "two types",
            r"the tokens of other are (uint16|int32) in .*ds and (uint16|int32) in .*ds; "
            r"give each type a source of its own",
        ),
        ("nothing", r"other .* holds no tokens"),
        ("odd", r"y\.npy: 15 bytes are not a whole number of uint32"),
        ("no end", r"y\.npy: none of its 2 tokens is 0, the end-of-text token"),
        ("wrong metadata", r"y\.csv\.gz: its last document ends at 8, but there are 4 tokens; is dtype"),
        ("broken metadata", r"y\.csv\.gz: Not a gzipped file"),
        ("floats", r"y\.npy: an array of float32 in 1 dimensions"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, what: str, message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(DataError, match=message):
        import_tokenized(damage(what)(folder), "other", tokenizer, tmp_path, 0.0)


def test_tokens_elsewhere_and_paths_without_files_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for path, message in [
        ("s3://bucket/x.ds", r"s3://bucket/x\.ds is not a local file; tokens are read in place"),
        (str(tmp_path / "gone"), r"gone does not exist"),
        (str(tmp_path / "tokenizer.json"), r"matches \*\.ds; set `pattern`"),
    ]:
        with pytest.raises(DataError, match=message):
            import_tokenized(SourceConfig(kind="datatrove", paths=(path,)), "x", tokenizer, tmp_path, 0.0)
    with pytest.raises(DataError, match="holds no prepared data"):
        import_tokenized(SourceConfig(kind="prepared", paths=(str(tmp_path / "gone"),)), "x", tokenizer, tmp_path, 0.0)
