from pathlib import Path

import pytest

from data_pipeline.atomic import open_atomic, read_checksummed, write_atomic, write_checksummed


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, b"old")

    def write_half() -> None:
        with open_atomic(file) as stream:
            stream.write(b"half of the new")
            assert file.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("file", b"old")]


def test_writers_of_the_same_file_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    with open_atomic(tmp_path / "file") as first, open_atomic(tmp_path / "file") as second:
        first.write(b"first")
        second.write(b"second")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("file", b"first")]


def test_a_checksummed_file_that_changed_reads_as_missing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert read_checksummed(file) is None
    write_checksummed(file, b"two\nlines")
    assert read_checksummed(file) == b"two\nlines"
    file.write_bytes(file.read_bytes().replace(b"two", b"six"))
    assert read_checksummed(file) is None
