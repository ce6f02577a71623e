"""Secrets in the addresses of files are redacted wherever addresses are written or shown."""

import gzip
import io
import pickle
from pathlib import Path

import datasets
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.addresses import expand_variables, make_redactor, restore_spelling
from data_pipeline.errors import DataError, redact
from data_pipeline.settings import PrepareConfig, SourceConfig, source_names
from data_pipeline.storage.token_files import list_token_files, token_paths
from data_pipeline.storage.tokenized import collect_trusted_paths
from data_pipeline.text.chunks import read_chunk, split_into_chunks
from data_pipeline.text.files import dataset_version, list_files, summarize_paths

REDACTED = {
    "s3://key:secret@host/x.jsonl": "s3://***:***@host/x.jsonl",
    "s3://AKIA:wJal/rXU/tn@bucket/path": "s3://***:***@bucket/path",
    "https://user:p@ss@host/x.jsonl?token=abc&sig=a/b%3D#f": "https://***:***@host/x.jsonl?token=***&sig=***",
    "https://token@host/x": "https://***@host/x",
    "sftp://alice:secret@host/x": "sftp://***:***@host/x",
    "simplecache::s3://a:b@h/x": "simplecache::s3://***:***@h/x",
    "zip://a.txt::https://u:p@h/x.zip?X-Amz-Signature=1;y=2": (
        "zip://a.txt::https://***:***@h/x.zip?X-Amz-Signature=***;y=***"
    ),
    "s3://${KEY}:${SECRET}@host/x?token=${T}&v=1": "s3://${KEY}:${SECRET}@host/x?token=${T}&v=***",
    "s3://u:${S}x@h": "s3://***:***@h",
    "cannot read 's3://k:se@h/x', nor ftp://u:pw@h/y.": "cannot read 's3://***:***@h/x', nor ftp://***:***@h/y.",
}
KEPT = [
    *(
        "/tmp/a@b/c?d=e",
        "C:/x",
        "s3://bucket/part-?.jsonl",
        "https://host:8080/a@b/c",
        "hf://datasets/O/N@main/x.parquet",
    ),
    *(
        "github://owner:repository@main/p",
        "file:///tmp/a@b/x?y",
        "https://host/a?b",
        "${HOME}/x",
        "s3://bucket/[ab]*/x{1,2}.jsonl",
    ),
    *(
        "abfs://texts@account.dfs.core.windows.net/x",
        "wasbs://c@a/x",
        "sftp://alice@host/x",
        "hdfs://alice@host:9000/x",
        "ftp://me@h/x",
    ),
]


@pytest.mark.parametrize(("text", "redacted"), [*REDACTED.items(), *((text, text) for text in KEPT)])
def test_redacting_an_address_is_idempotent(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert redact(redacted) == redacted


def test_serialized_settings_have_no_secret() -> None:
    source = SourceConfig(
        kind="jsonl", paths=("s3://key:secret@bucket/web/*.jsonl", "s3://${K}:${S}@bucket/b.jsonl", "my/folder")
    )
    config = PrepareConfig.model_validate({"sources": [source], "decontaminate": {"paths": ["ftp://u:secret@h/e.txt"]}})
    for written in (config.model_dump_json(), str(config.model_dump())):
        assert "secret" not in written
        assert all(
            kept in written
            for kept in ("s3://***:***@bucket/web/*.jsonl", "s3://${K}:${S}@bucket/b.jsonl", "my/folder")
        )
    assert config.sources[0].paths[0] == "s3://key:secret@bucket/web/*.jsonl"
    assert PrepareConfig.model_validate(config.model_dump()).model_dump() == config.model_dump()


def test_the_name_of_a_source_contains_no_secret() -> None:
    secret = ("https://user:secret@host", "s3://k:se/cret@b/web/*.jsonl", "https://h/d/x?sig=ab/secret")
    paths = (*secret, "s3://bucket/web-2/*.jsonl", "c/code.txt")
    names = source_names(PrepareConfig(sources=tuple(SourceConfig(kind="text", paths=(path,)) for path in paths)))
    assert names == ("source", "web", "d", "web-2", "code")


def test_variables_are_expanded_from_the_environment() -> None:
    assert expand_variables("s3://${K}:${S}@b/${K}", environment={"K": "key", "S": "secret"}) == "s3://key:secret@b/key"
    assert expand_variables("$K/{K}/x", environment={}) == "$K/{K}/x"
    with pytest.raises(DataError) as caught:
        expand_variables("s3://${K}@b", environment={})
    assert (
        str(caught.value) == "data.sources: s3://${K}@b needs ${K}, but it is not set in the environment; export K=..."
    )
    with pytest.raises(
        DataError, match=r"s3://\*\*\*:\*\*\*@b was written without its secret; put the secret into an environment"
    ):
        expand_variables("s3://***:***@b")


def test_secrets_in_library_messages_are_redacted_in_every_form() -> None:
    conceal = make_redactor(
        ["ftp://bob:pa%2Fssword@h/x?sig=signature", "s3://${K}@b", "x://a:b@c"], {"K": "value of K"}
    )
    said = "530 Login of bob with pa/ssword or pa%2Fssword failed; signature, value of K; ftp://other:secret@h; abc"
    assert conceal(said) == "530 Login of bob with *** or *** failed; ***, ${K}; ftp://***:***@h; abc"


def test_errors_have_no_addresses_with_secrets_and_cross_processes() -> None:
    error = DataError("cannot read s3://key:secret@h/x")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "cannot read s3://***:***@h/x"


class Web(fsspec.AbstractFileSystem):
    """A file system whose paths are whole addresses, like HTTP."""

    protocol = "web"
    files: dict = {}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def isdir(self, path: str) -> bool:
        return False

    def info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "type": "file", "size": len(self.files[path])}

    def open(self, path: str, mode: str = "rb", **_: object) -> io.BytesIO:
        return io.BytesIO(self.files[path])


def test_a_query_does_not_hide_the_compression_nor_a_name_in_an_address_a_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec.register_implementation("web", Web, clobber=True)
    monkeypatch.setenv("TOKEN", "jsonl")  # a secret that is also part of the file's name
    packed = gzip.compress(b'{"text": "a"}\n')
    monkeypatch.setattr(Web, "files", {"web://h/d/x.jsonl.gz?token=jsonl": packed, "web://h/d/y.jsonl.gz": packed})
    for address, name in (
        ("web://h/d/x.jsonl.gz?token=${TOKEN}", "web://h/d/x.jsonl.gz?token=${TOKEN}"),
        ("web://h/d/x.jsonl.gz?token=jsonl", "web://h/d/x.jsonl.gz?token=***"),
        ("web://h/d/y.jsonl.gz", "web://h/d/y.jsonl.gz"),
    ):
        source = SourceConfig(kind="jsonl", paths=(address,))
        (chunk,) = split_into_chunks(0, "s", source, list_files(source), 1)
        assert [(document.id, document.text) for document in read_chunk(chunk, source)] == [(f"{name}@0", "a")]
    assert summarize_paths(["web://h/d/y.jsonl.gz?token=jsonl"]) == "1 file (1 .jsonl.gz), y.jsonl.gz"


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("/a:b@c/d.txt?s=t0", "memory://a:b@c/d.txt?s=t0", "***:***@c/d.txt?s=***"),
        ("k:x/y@c/x/y.txt", "s3://k:x/y@c/x/*.txt", "***:***@c/x/y.txt"),
        ("/d.txt?s=t0", "ftp://a:b@c/d.txt?s=t0", "d.txt?s=***"),
        ("https://h/value/value.txt", "https://h/${V}/*.txt", "https://h/${V}/value.txt"),
        ("https://h/d/e?f=g.txt", "https://h/d/*.txt", "https://h/d/e?f=g.txt"),
        ("texts/d?e=f.txt", "abfs://texts@account/", "texts/d?e=f.txt"),
        ("/value/value.txt", "/${V}", "/value/value.txt"),
    ],
)
def test_only_the_address_in_a_path_is_redacted(
    path: str, given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V", "value")
    assert restore_spelling(path, given) == expected


def test_a_changed_secret_does_not_rename_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("vault", Vault, clobber=True)
    Vault.store.clear()
    fsspec.filesystem("vault", user="docs", password="chapter").pipe("/texts/docs/chapter.txt", b"the first")
    monkeypatch.setenv("PASSWORD", "chapter")
    for password in ("chapter", "${PASSWORD}"):
        (file,) = list_files(SourceConfig(kind="text", paths=(f"vault://docs:{password}@texts",)))
        assert file.name == "docs/chapter.txt"


def test_variables_are_expanded_in_every_kind_of_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.delenv("ELSEWHERE", raising=False)
    (tmp_path / "x.bin").write_bytes(b"12")
    megatron = SourceConfig(kind="megatron", paths=("${DATA}/x",))
    prepared = SourceConfig(kind="prepared", paths=("${DATA}/p",))
    assert token_paths(megatron) == (f"{tmp_path}/x.bin",)
    assert [file.path for file in list_token_files(megatron)] == [f"{tmp_path}/x.bin"]
    assert collect_trusted_paths(PrepareConfig(sources=(megatron, prepared))) == [tmp_path / "x.bin", tmp_path / "p"]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    saved = SourceConfig(kind="hf", paths=("${DATA}/saved",))
    (chunk,) = split_into_chunks(0, "s", saved, [], 1)
    assert [document.text for document in read_chunk(chunk, saved)] == ["a"]
    assert dataset_version("${DATA}/saved") == dataset_version(f"{tmp_path}/saved") != ""
    for kind in ("prepared", "olmo"):
        elsewhere = SourceConfig.model_validate({"kind": kind, "paths": ["${ELSEWHERE}/x"]})
        with pytest.raises(
            DataError,
            match=r"^data\.validation: \$\{ELSEWHERE\}/x needs \$\{ELSEWHERE\}, but it is not set in the environment",
        ):
            collect_trusted_paths(PrepareConfig(sources=(megatron,), validation=(elsewhere,)))


class Vault(MemoryFileSystem):
    """Reads user and password from the address, like ftp and sftp, and repeats them in every error."""

    protocol = "vault"
    store: dict = {}  # noqa: RUF012  # of the class, as in its parent
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("vault://").rpartition("@")[2])

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        user, _, password = path.removeprefix("vault://").rpartition("@")[0].partition(":")
        return {"user": user, "password": password}

    def _open(self, path: str, *args: object, **kwargs: object) -> object:
        if path.endswith("broken.txt") and kwargs["mode"] == "rb":
            raise PermissionError(
                f"user {self.storage_options['user']} with password {self.storage_options['password']} may not"
            )
        return super()._open(path, *args, **kwargs)


def test_a_password_in_the_error_of_a_driver_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("vault", Vault, clobber=True)
    monkeypatch.setenv("VAULT_PASSWORD", "opensesame")
    Vault.store.clear()
    vault = fsspec.filesystem("vault", user="alice", password="opensesame")
    vault.pipe("/docs/a.txt", b"the first")
    vault.pipe("/docs/broken.txt", b"the second")
    for address in ("vault://alice:opensesame@docs", "vault://alice:${VAULT_PASSWORD}@docs"):
        source = SourceConfig(kind="text", paths=(address,))
        files = list_files(source)
        assert [file.name for file in files] == ["a.txt", "broken.txt"]
        (chunk,) = split_into_chunks(0, "docs", source, files, 1000)
        documents = read_chunk(chunk, source)
        assert next(documents).text == "the first"
        with pytest.raises(DataError) as caught:
            next(documents)
        assert "opensesame" not in str(caught.value)
        assert "user alice with password" in str(caught.value)
    assert "${VAULT_PASSWORD} may not" in str(caught.value)
