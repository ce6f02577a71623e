"""Manifests of somebody else lead nowhere but into their own folder, unless the user's own settings say so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from pretrain.checked_json import format_checked_json
from pretrain.checkpoint.directory import checkpoint_path
from pretrain.checkpoint.manifest import read_manifest
from pretrain.errors import UserError

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py


def change(folder: Path, change_shard: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of prepared data whose manifest somebody changed."""
    file = folder / "train" / "manifest.json"
    manifest = json.loads(file.read_text())
    change_shard(manifest)
    file.write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b", ".."])
@pytest.mark.parametrize("where", ["shard", "splits"])
def test_a_manifest_that_names_files_elsewhere_is_refused(
    pretrain: Pretrain, tiny_data: Path, tiny_args: Callable[..., list[str]], tmp_path: Path, name: str, where: str
) -> None:
    def put(manifest: dict[str, Any]) -> None:
        if where == "shard":
            manifest["sources"][0]["shards"][0]["name"] = name
        else:
            manifest["splits"] = ["train", name]

    data = change(shutil.copytree(tiny_data, tmp_path / "data"), put)
    args = tiny_args(tmp_path / "run", f"data.path={data}", "train.steps=5")
    for command in (("train", *args), ("data", "inspect", data), ("data", "verify", data)):
        answer = pretrain(*command)
        assert answer.code == 2
        assert answer.err.startswith(
            f"error: {data / 'train' / 'manifest.json'} names {name!r}, which is not a file of its folder: "
        )
        assert answer.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_tokens_elsewhere_are_read_only_where_the_settings_name_them(
    pretrain: Pretrain, tiny_data: Path, tiny_args: Callable[..., list[str]], tmp_path: Path
) -> None:
    """`prepared` names the tokens of another data set where they lie."""
    corpus, mixed = shutil.copytree(tiny_data, tmp_path / "corpus"), tmp_path / "mixed"
    source = SourceConfig(kind="prepared", name="tiny", paths=(str(corpus),))
    prepare(mixed, PrepareConfig(sources=(source,), tokenizer=corpus / "tokenizer.json", workers=1))
    sources = f"data.sources=[{{kind: prepared, name: tiny, paths: [{corpus}]}}]"

    def train(*more: str) -> Any:
        return pretrain(
            "train", *tiny_args(tmp_path / "run", f"data.path={mixed}", "train.steps=5", "eval.every=9", *more)
        )

    refused = train()
    assert refused.code == 2
    shards = sorted((corpus / "train").glob("*.bin"))
    assert refused.err == (
        f"error: {mixed / 'train' / 'manifest.json'} has tokens read from {shards[0]} and {len(shards) - 1} "
        f"more, outside of its folder: "
        f"only if you know who prepared it, set data.external=[{corpus / 'train'}], or name the sources in "
        f"data.sources as they were when "
        f"it was prepared\n"
    )
    assert not (tmp_path / "run").exists()
    assert train(f"data.external=[{tmp_path / 'elsewhere'}]").code == 2
    assert train(sources).code == 0
    assert train(f"data.external=[{corpus}]").code == 0
    for command in ("inspect", "verify"):
        assert "outside of its folder" in pretrain("data", command, mixed).err
        assert pretrain("data", command, mixed, "--external", corpus).code == 0
    assert pretrain("data", "inspect", mixed, sources, "train.steps=5").code == 0

    again = PrepareConfig(
        sources=(SourceConfig(kind="prepared", paths=(str(mixed),)),), tokenizer=corpus / "tokenizer.json", workers=1
    )
    with pytest.raises(DataError, match="outside of its folder"):
        prepare(tmp_path / "again", again)
    prepare(tmp_path / "again", again.model_copy(update={"external": (corpus,)}))


def test_a_link_in_a_trusted_folder_leads_not_out_of_it(tiny_data: Path, tmp_path: Path, pretrain: Pretrain) -> None:
    (tmp_path / "trusted").mkdir()
    (tmp_path / "trusted" / "x.bin").symlink_to("/etc/passwd")

    def put(manifest: dict[str, Any]) -> None:
        manifest["sources"][0]["shards"][0]["external_bin"] = str(tmp_path / "trusted" / "x.bin")

    data = change(shutil.copytree(tiny_data, tmp_path / "data"), put)
    answer = pretrain("data", "verify", data, "--external", tmp_path / "trusted")
    assert answer.code == 2
    assert "outside of its folder" in answer.err


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_checkpoint_that_names_files_elsewhere_is_refused(
    tmp_path: Path, run_tiny: Callable[..., object], name: str
) -> None:
    run_tiny(tmp_path, "train.steps=2", "optim.warmup=1", "eval.every=9")
    path = checkpoint_path(tmp_path / "checkpoints", 2)
    content = json.loads((path / "manifest.json").read_text())
    content.pop("checksum")
    content["files"][name] = content["files"].pop("__0_0.distcp")
    (path / "manifest.json").write_text(format_checked_json(content))
    with pytest.raises(UserError, match="names a file outside of the checkpoint") as caught:
        read_manifest(path)
    assert repr(name) in str(caught.value)
    with pytest.raises(UserError, match="names a file outside of the checkpoint"):
        run_tiny(tmp_path, "train.steps=2", "optim.warmup=1", "eval.every=9")
