"""Listing the files of a source: links, equal names, files given twice, versions, and errors of drivers."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.errors import DataError
from data_pipeline.settings import SourceConfig
from data_pipeline.text import files
from data_pipeline.text.chunks import read_chunk, split_into_chunks
from data_pipeline.text.files import SourceFile, dataset_version, list_files


def listed(*paths: object, **settings: object) -> list[SourceFile]:
    return list_files(SourceConfig.model_validate({"kind": "text", "paths": [str(path) for path in paths], **settings}))


def names(*paths: object, **settings: object) -> list[str]:
    return [file.name for file in listed(*paths, **settings)]


def write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder as huggingface_hub writes it: names are links to blobs, and one of them is in a folder that is a
    link.
    """
    write(tmp_path / "blobs" / "1a", tmp_path / "blobs" / "2b", tmp_path / "elsewhere" / "plain.txt")
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "data" / "x.txt").symlink_to("../../blobs/1a")
    (tmp_path / "elsewhere" / "y.txt").symlink_to(tmp_path / "blobs" / "2b")
    (tmp_path / "snapshot" / "linked").symlink_to("../elsewhere", target_is_directory=True)
    return tmp_path / "snapshot"


def test_links_to_files_and_folders_are_followed(cache: Path) -> None:
    found = listed(cache)
    assert [file.name for file in found] == ["data/x.txt", "linked/plain.txt", "linked/y.txt"]
    assert [file.size for file in found] == [2, 9, 2]
    source = SourceConfig(kind="text", paths=(str(cache),))
    texts = [
        document.text
        for chunk in split_into_chunks(0, "s", source, found, 1000)
        for document in read_chunk(chunk, source)
    ]
    assert texts == ["1a", "plain.txt", "2b"]
    assert names(cache / "data" / "x.txt") == ["x.txt"]
    assert names(cache / "linked") == ["plain.txt", "y.txt"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("*/*.txt", ["data/x.txt", "linked/plain.txt", "linked/y.txt"]),
        ("**/*.txt", ["data/x.txt", "linked/plain.txt", "linked/y.txt"]),
        ("l*/*.txt", ["linked/plain.txt", "linked/y.txt"]),
        ("linked/?.txt", ["y.txt"]),
        ("**/[xy].txt", ["data/x.txt", "linked/y.txt"]),
    ],
)
def test_globs_follow_links_as_folders_do(cache: Path, glob: str, expected: list[str]) -> None:
    assert names(cache / glob) == expected


def test_fsspec_lists_linked_files_as_neither_file_nor_folder(cache: Path) -> None:
    fs = fsspec.filesystem("file")
    assert [info["type"] for info in fs.ls(cache / "data", detail=True)] == ["other"]
    assert fs.glob(str(cache / "*" / "plain.txt")) == []


def test_a_link_to_a_parent_folder_is_skipped_and_one_to_a_sibling_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.txt", tmp_path / "b" / "y.txt")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "b" / "beside").symlink_to("../a")
    expected = ["a/x.txt", "b/beside/x.txt", "b/y.txt"]
    assert names(tmp_path) == names(tmp_path / "**" / "*.txt") == expected
    assert names(tmp_path / "a") == ["up/b/y.txt", "x.txt"]


@pytest.mark.parametrize("target", ["nowhere", "gone.txt"])
def test_a_broken_link_is_named_unless_it_is_excluded(tmp_path: Path, target: str) -> None:
    write(tmp_path / "x.txt")
    (tmp_path / "gone.txt").symlink_to(target)  # the second link points to itself
    for given in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(DataError, match=r"gone\.txt is a broken link; .*exclude"):
            listed(given)
        assert names(given, exclude=["gone.*"]) == ["x.txt"]
    assert names(tmp_path / "x*.txt") == ["x.txt"]


def test_a_broken_link_that_would_not_be_read_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "x.txt")
    for name in (".#x.txt", "latest"):  # `.#x.txt` is an editor's lock file
        (tmp_path / name).symlink_to("gone")
    assert names(tmp_path) == ["x.txt"]


def test_globs_do_not_look_into_excluded_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt", tmp_path / "c" / "deep" / "x.txt")
    looked: list[str] = []
    fs = fsspec.filesystem("file")
    real = type(fs).ls

    def ls(fs: fsspec.AbstractFileSystem, path: str, **more: object) -> object:
        looked.append(Path(path).name)
        return real(fs, path, **more)

    monkeypatch.setattr(type(fs), "ls", ls)
    assert names(tmp_path / "*" / "x.txt", exclude=["b"]) == ["a/x.txt"]
    assert sorted(looked) == sorted([tmp_path.name, "a", "c"])


def test_equal_names_of_two_entries_become_unique_and_an_appended_entry_changes_no_name(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name / "data" for name in "abc")
    write(a / "x.txt", a / "only.txt", b / "x.txt", b / "data" / "x.txt", c / "x.txt", c / "y.txt")
    assert names(a) == ["only.txt", "x.txt"]
    assert names(a, b) == ["only.txt", "x.txt", "data/x.txt", "b/data/x.txt"]
    assert names(a, b, c) == ["only.txt", "x.txt", "data/x.txt", "b/data/x.txt", "c/data/x.txt", "y.txt"]
    assert names(a / "x.txt", b / "x.txt") == ["x.txt", "data/x.txt"]
    fsspec.filesystem("memory").pipe("/a.txt", b"")
    write(tmp_path / "a.txt")
    assert names("memory://a.txt", tmp_path / "a.txt") == ["a.txt", f"{tmp_path.name}/a.txt"]
    assert names(tmp_path / "a.txt", "memory://a.txt") == ["a.txt", "/a.txt"]


@pytest.mark.parametrize(
    "entries",
    [("a", "a"), ("a", "a/x.txt"), ("a/*.txt", "a/x*"), ("a/../a", "./a"), ("a", "link"), ("link/*", "a/x.txt")],
)
def test_a_file_given_twice_is_named_with_both_entries(tmp_path: Path, entries: tuple[str, str]) -> None:
    write(tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt")
    (tmp_path / "link").symlink_to("a")
    first, second = (f"{tmp_path}/{entry}" for entry in entries)
    with pytest.raises(DataError) as error:
        listed(first, tmp_path / "b", second)
    assert f"x.txt is given twice, by {first} and by {second} of `paths`" in str(error.value)
    assert len(listed(first, tmp_path / "b")) == len(listed(second, tmp_path / "b")) == 2


def test_a_dataset_given_twice_is_named_and_the_rows_of_two_have_different_ids(tmp_path: Path) -> None:
    paths = tuple(str(tmp_path / name / "data") for name in "abc")
    for path in paths:
        write(Path(path) / "x.jsonl")
        (Path(path) / "x.jsonl").write_text('{"text": "the same"}\n')
    source = SourceConfig(kind="hf", paths=paths)
    ids = [
        document.id
        for chunk in split_into_chunks(0, "s", source, list_files(source), 1)
        for document in read_chunk(chunk, source)
    ]
    assert ids == ["train:0", "data/train:0", "c/data/train:0"]
    with pytest.raises(DataError, match=rf"`paths` names the dataset {paths[0]} twice"):
        list_files(SourceConfig(kind="hf", paths=(*paths, paths[0])))


def test_the_version_of_a_file_changes_only_when_it_is_rewritten(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    write(file)
    (tmp_path / "link.txt").symlink_to(file)
    before = listed(tmp_path)
    assert listed(tmp_path) == before
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
    after = listed(tmp_path)
    assert [file.size for file in after] == [file.size for file in before]
    assert all(new.version != old.version for new, old in zip(after, before, strict=True))
    assert files.describe_files(after) == files.describe_files(before)  # this description goes into the recipe
    memory = fsspec.filesystem("memory")
    memory.pipe("/versions/x.txt", b"one")
    (first,) = listed("memory://versions")
    assert listed("memory://versions") == [first]
    memory.pipe("/versions/x.txt", b"two")
    assert listed("memory://versions")[0].version != first.version


@dataclass
class Remote:
    """A remote file system: listings have `more` keys besides name, type and size; folders named `locked` raise
    `error`.
    """

    more: dict[str, object] = field(default_factory=dict)
    error: Exception = field(default_factory=OSError)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Remote:
    """The file system of memory://far."""
    fsspec.filesystem("memory").pipe({"/far/x.txt": b"x", "/far/locked/y.txt": b"y"})
    remote, real = Remote(), MemoryFileSystem.ls

    def ls(fs: MemoryFileSystem, path: str, detail: bool = True, **more: object) -> list[dict[str, object]]:
        if path.endswith("locked"):
            raise remote.error
        return [
            {key: info[key] for key in ("name", "type", "size")} | remote.more
            for info in real(fs, path, detail=True, **more)
        ]

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    return remote


@pytest.mark.parametrize(
    ("more", "version"),
    [
        ({"ETag": '"1"', "LastModified": 3}, '"1"'),
        ({"generation": 7}, "7"),
        ({"md5Hash": "a", "updated": "b"}, "a"),
        ({"mtime": 2}, "2"),
        ({}, ""),
    ],
)
def test_the_version_of_a_remote_file_is_the_most_reliable_one_known(
    remote: Remote, more: dict[str, object], version: str
) -> None:
    remote.more = more
    assert [file.version for file in listed("memory://far", exclude=["locked"])] == [version]


class DriverError(Exception):
    """An error like those of botocore or aiohttp, which are not OSErrors."""


@pytest.mark.parametrize("error", [DriverError("no\ncredentials"), PermissionError("no credentials")])
def test_an_error_of_a_driver_on_a_subfolder_is_one_line(remote: Remote, error: Exception) -> None:
    remote.error = error
    with pytest.raises(DataError, match=r"^data\.sources: cannot read memory://far: no credentials; check `paths`"):
        listed("memory://far")
    assert names("memory://far", exclude=["locked"]) == ["x.txt"]


@pytest.mark.parametrize("error", [DriverError("broken\npipe"), OSError("broken pipe")])
def test_an_error_of_a_driver_while_reading_a_file_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").pipe("/far/x.txt", b"x")
    source = SourceConfig(kind="text", paths=("memory://far/x.txt",))
    (chunk,) = split_into_chunks(0, "s", source, list_files(source), 1000)

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(MemoryFileSystem, "open", fails)
    with pytest.raises(
        DataError, match=r"^/far/x\.txt: cannot be read, it may be corrupt or unreachable \(broken pipe\)"
    ):
        list(read_chunk(chunk, source))


def test_a_bug_in_our_code_is_not_reported_as_bad_input(remote: Remote) -> None:
    remote.error = TypeError("a mistake")
    with pytest.raises(TypeError, match="a mistake"):
        listed("memory://far")


def test_a_missing_driver_is_reported_with_the_package_to_install() -> None:
    for given, package in {
        "s3://bucket/x": "s3fs",
        "gs://bucket/x": "gcsfs",
        "sftp://host/x": "paramiko",
        "abfs://a/x": "adlfs",
    }.items():
        with pytest.raises(DataError, match=rf"cannot read {given}: .*; pip install {package}$"):
            listed(given)


def test_the_version_of_a_dataset_depends_on_its_files_or_commit_and_is_empty_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dataset_version(str(cache))
    assert dataset_version(str(cache)) == before != ""
    os.utime(cache / "data" / "x.txt", ns=(0, 10**18))  # changes the blob
    assert dataset_version(str(cache)) != before
    of_file = dataset_version(str(cache / "data" / "x.txt"))
    os.utime(cache / "data" / "x.txt", ns=(0, 2 * 10**18))
    assert dataset_version(str(cache / "data" / "x.txt")) != of_file

    def answers(what: str | Exception) -> None:
        def dataset_info(self: object, name: str, **_: object) -> SimpleNamespace:
            if isinstance(what, Exception):
                raise what
            return SimpleNamespace(id=name, sha=what)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)

    answers("abc")
    assert dataset_version("someone/something") == "abc"
    for error in (
        DriverError("no connection"),
        huggingface_hub.errors.OfflineModeIsEnabled("offline"),
        ValueError("no such name"),
    ):
        answers(error)
        assert dataset_version("someone/something") == ""
    answers(TypeError("a mistake"))
    with pytest.raises(TypeError):
        dataset_version("someone/something")


SKIPPED = ("b.json", "c.JSONL", "d.ndjson", "e.json.gz")


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_skipped_files_of_a_folder_are_counted_by_extension_with_the_names_of_a_few(tmp_path: Path, place: str) -> None:
    names = ("a.jsonl", *SKIPPED, "z/f.json", ".hidden/x.json", ".DS_Store", "z/_SUCCESS", "left/g.json")
    folder = f"memory://{tmp_path}" if place == "memory" else str(tmp_path)
    for name in names:
        with fsspec.open(f"{folder}/{name}", "wb", auto_mkdir=True) as stream:
            stream.write(b'{"text": "a"}\n')

    def found(*paths: str, **settings: object) -> files.SourceListing:
        return files.list_source(SourceConfig.model_validate({"kind": "jsonl", "paths": paths, **settings}))

    here = found(folder, exclude=["left"])
    assert [file.name for file in here.files] == ["a.jsonl"]
    assert [Path(path).name for path in here.skipped] == [*SKIPPED, "f.json"]
    summary = "5 files (2 .json, 1 .JSONL, 1 .json.gz, 1 .ndjson), b.json, c.JSONL, d.ndjson, e.json.gz and f.json"
    assert files.summarize_paths(here.skipped) == summary
    assert len(found(folder).skipped) == 6
    assert found(folder, exclude=["left", "*.json", "c.*"]).skipped == [
        f"{here.files[0].path[:-7]}{name}" for name in SKIPPED[2:]
    ]
    assert found(f"{folder}/*.jsonl").skipped == []  # a glob is a choice, so nothing is reported
    more = found(folder, f"{folder}/b.json", f"{folder}/c.JSONL", exclude=["left"])
    assert [file.name for file in more.files] == ["a.jsonl", "b.json", "c.JSONL"]
    assert [Path(path).name for path in more.skipped] == ["d.ndjson", "e.json.gz", "f.json"]
    assert [file.name for file in found(folder, pattern="*.ndjson").files] == ["d.ndjson"]
    with pytest.raises(
        DataError, match=r"no file below .* matches \*\.csv.*; it holds 6 files .*; correct `paths`, or set `pattern`"
    ):
        found(folder, pattern="*.csv", exclude=["left"])


def test_a_note_on_many_files_is_short_and_printable() -> None:
    names = [f"{i}.{ending}" for i, ending in enumerate(["a"] * 4 + ["b"] * 3 + ["c", "d", "e", "f", "g.gz"])]
    summary = files.summarize_paths([*names, "x/a\nb\udcff"])
    assert summary == ("13 files (4 .a, 3 .b, 1 .c, 1 .d, 1 .e, 3 others), such as 0.a, 1.a, 2.a, 3.a and 4.b")
    assert files.summarize_paths(["x/a\nb\udcff"]) == "1 file (1 without an ending), a\\nb\\udcff"


def test_special_files_are_skipped_by_name(tmp_path: Path) -> None:
    write(tmp_path / "x.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    found = files.list_source(SourceConfig(kind="text", paths=(str(tmp_path),)))
    assert ([file.name for file in found.files], found.skipped) == (["x.txt"], [f"{tmp_path}/pipe.txt"])


@pytest.mark.parametrize("given", ["memory://far", "memory://far/*/y.txt", "memory://far/**/*.txt"])
def test_a_folder_without_read_permission_is_an_error_for_folders_and_globs(
    remote: Remote, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fsspec's own glob skips folders that it may not list.
    monkeypatch.setattr(MemoryFileSystem, "find", fsspec.AbstractFileSystem.find)
    assert fsspec.filesystem("memory").glob("/far/*/y.txt") == []
    remote.error = PermissionError("no permission")
    with pytest.raises(DataError, match=r"^data\.sources: cannot read memory://far.*: no permission; check `paths`"):
        listed(given)
    assert names("memory://far/*.txt") == ["x.txt"]  # this glob does not need to look into the locked folder


def test_a_file_without_read_permission_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.txt")
    source = SourceConfig(kind="text", paths=(str(tmp_path),))
    (chunk,) = split_into_chunks(0, "s", source, list_files(source), 1000)
    real = fsspec.implementations.local.LocalFileSystem.open

    def locked(fs: object, path: str, *given: object, **more: object) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "open", locked)
    with pytest.raises(DataError, match=rf"^{tmp_path}/x\.txt: cannot be read, .*Permission denied"):
        list(read_chunk(chunk, source))
    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "open", real)
    assert [document.text for document in read_chunk(chunk, source)] == ["x.txt"]


def test_object_stores_answer_a_glob_by_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own walk would list every folder of `hf://datasets/ORG/NAME/**/*.parquet`."""
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/store/{i}/x.txt": b"x" for i in range(3)})
    listed_folders: list[str] = []
    real_ls, real_find = MemoryFileSystem.ls, MemoryFileSystem.find

    def ls(fs: MemoryFileSystem, path: str, *given: object, **more: object) -> object:
        listed_folders.append(path)
        return real_ls(fs, path, *given, **more)

    def find(fs: MemoryFileSystem, path: str, *given: object, **more: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryFileSystem, "ls", real_ls)
            return real_find(fs, path, *given, **more)

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    monkeypatch.setattr(MemoryFileSystem, "find", fsspec.AbstractFileSystem.find)
    expected = [f"{i}/x.txt" for i in range(3)]
    assert names("memory://store/**/*.txt") == expected
    assert len(listed_folders) == 4  # the folder and its subfolders
    listed_folders.clear()
    monkeypatch.setattr(MemoryFileSystem, "find", find)
    assert names("memory://store/**/*.txt") == expected
    assert listed_folders == []
