"""The validation loss of each source, its sum over sources, and its independence of the number of processes."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.held_out import allocate_validation_sequences
from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from data_pipeline.storage.prepared import open_prepared
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.runs.jsonl import read_metrics
from pretrain.runs.schema import ValidationRecord
from pretrain.runs.throughput import ThroughputMeter
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import resolve_run
from pretrain.signals import StopRequest
from pretrain.train.inputs import open_data
from pretrain.train.loop import TrainLoop
from pretrain.train.rank_info import RankInfo

TinyArgs = Callable[..., list[str]]
WHO, DOES = ("the model", "a reader", "every rank", "one shard"), ("reads", "writes", "skips", "remembers", "follows")
ARGS = (
    "train.steps=2",
    "optim.warmup=0",
    "eval.every=2",
    "eval.batches=100",
    "model.n_kv_heads=2",
    "model.init_std=0.3",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    """Two sources of 120 and 40 documents that look different."""
    random, sources = Random(1), {}
    for name, documents in (("prose", 120), ("sums", 40)):
        folder = tmp_path_factory.mktemp("texts") / name
        folder.mkdir()
        for number in range(documents):
            lines = (
                f"{random.choice(WHO)} {random.choice(DOES)} it.\n"
                if name == "prose"
                else f"{random.randint(0, 99)} + {random.randint(0, 99)} = {random.randint(0, 198)}\n"
                for _ in range(random.randint(2, 8))
            )
            (folder / f"{number:03d}.txt").write_text("".join(lines))
        sources[name] = SourceConfig(name=name, kind="text", paths=(str(folder),))
    return sources


@pytest.fixture(scope="module")
def datas(texts: dict[str, SourceConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both sources together, and each alone with the same tokenizer."""
    folder = tmp_path_factory.mktemp("datas")
    settings = {
        "vocab_size": 300,
        "tokenizer_sample_mb": 1,
        "validation_fraction": 0.2,
        "shard_tokens": 4000,
        "workers": 1,
    }
    prepare(folder / "both", PrepareConfig(sources=tuple(texts.values()), **settings))
    for name, source in texts.items():
        prepare(
            folder / name, PrepareConfig(sources=(source,), tokenizer=folder / "both" / "tokenizer.json", **settings)
        )
    return {name: folder / name for name in ("both", *texts)}


@pytest.fixture(scope="module")
def first(
    datas: dict[str, Path], run_tiny: Callable[..., object], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ValidationRecord]:
    """The validation before the first step, of equal initial weights on each of the data sets."""
    folder = tmp_path_factory.mktemp("runs")
    for name, data in datas.items():
        run_tiny(folder / name, f"data.path={data}", *ARGS)
    return {name: read_metrics(folder / name / "metrics.jsonl").validations[0] for name in datas}


def test_the_token_weighted_mean_of_the_sources_is_the_validation_loss(first: dict[str, ValidationRecord]) -> None:
    both = first["both"]
    assert list(both.by_source) == ["prose", "sums"]
    assert sum(source.tokens for source in both.by_source.values()) == both.val_tokens
    weighted = sum(source.loss * source.tokens for source in both.by_source.values()) / both.val_tokens
    assert weighted == pytest.approx(both.val_loss, rel=1e-12)
    plain = sum(source.loss for source in both.by_source.values()) / 2
    assert plain != pytest.approx(both.val_loss, rel=1e-3)  # negative control: the weights matter


def test_the_loss_of_a_source_is_that_of_a_data_set_of_this_source_alone(first: dict[str, ValidationRecord]) -> None:
    for name in ("prose", "sums"):
        alone, within = first[name], first["both"].by_source[name]
        assert within.tokens == alone.val_tokens
        assert within.loss == pytest.approx(alone.val_loss, rel=1e-12)
        assert alone.by_source[name].loss == alone.val_loss
    assert first["prose"].val_loss != pytest.approx(first["sums"].val_loss, rel=1e-3)


def validate_on(config: RunConfig) -> ValidationRecord:
    """The validation before the first step, on this rank of the pool's group."""
    from torch import distributed

    world = World(distributed.get_rank(), distributed.get_world_size())
    resolved = resolve_run(config, tokenizer_size=300, world_size=world.size)
    config, batches, place = resolved.config, resolved.batches, RankInfo(world, resolved.layout)
    data = open_data(config.data, config.run.seed, batches)
    records: list[ValidationRecord] = []
    recorder = SimpleNamespace(log=records.append, display=SimpleNamespace(validation=lambda _: None))
    meter = ThroughputMeter(total_tokens=1, peak_flops=None)
    engine = build_engine(config, place.layout, world.rank)
    rest = config.run.dir, recorder, meter, StopRequest(), place, None
    TrainLoop(config, batches, engine, *data, *rest)._validate(0)  # type: ignore[arg-type]  # stand-ins
    return records[0]


@pytest.mark.parametrize("layout", ["parallel.shard=2", "parallel.pipeline=2"])
def test_two_ranks_find_the_same_losses(
    workers: object,
    datas: dict[str, Path],
    first: dict[str, ValidationRecord],
    tiny_args: TinyArgs,
    tmp_path: Path,
    layout: str,
) -> None:
    args = tiny_args(tmp_path, f"data.path={datas['both']}", *ARGS, "train.micro_batch_size=2", layout)
    for record in workers.run(validate_on, 2, load(None, args).config):
        assert record.val_loss == pytest.approx(first["both"].val_loss, rel=1e-6)
        for name, source in first["both"].by_source.items():
            assert record.by_source[name].tokens == source.tokens
            assert record.by_source[name].loss == pytest.approx(source.loss, rel=1e-6)


def test_a_budget_for_all_reads_all_and_a_smaller_one_a_share_of_each() -> None:
    sizes = {"web": 9_900, "code": 90, "tiny": 3, "none": 0}
    assert allocate_validation_sequences(sizes, 10**6) == {"web": 9_900, "code": 90, "tiny": 3}
    read = allocate_validation_sequences(sizes, 640)
    assert read == {"web": 634, "code": 8, "tiny": 3}  # in proportion: 634, 6, 0
    assert allocate_validation_sequences({"web": 500}, 2) == {"web": 2}
    assert allocate_validation_sequences({"web": 500, "code": 500}, 64) == {"web": 32, "code": 32}
    assert allocate_validation_sequences({"web": 500, "code": 5}, 4) == {"web": 4, "code": 2}
    assert allocate_validation_sequences({"web": 500, "code": 5, "tiny": 1}, 1) == {"web": 1, "code": 1, "tiny": 1}
    assert allocate_validation_sequences({"web": 0}, 4) == {}


def test_prepare_inspect_and_train_warn_of_sources_with_little_held_out_text(
    tmp_path: Path, texts: dict[str, SourceConfig], pretrain: Callable[..., Any], tiny_args: TinyArgs
) -> None:
    sources = (
        "data.sources=[" + ", ".join(f"{{kind: text, paths: [{source.paths[0]}]}}" for source in texts.values()) + "]"
    )
    args = (
        sources,
        f"data.path={tmp_path / 'data'}",
        "data.vocab_size=300",
        "data.seq_len=32",
        "data.validation_fraction=1e-9",
    )
    prepared = pretrain("data", "prepare", *args)
    message = [line for line in prepared.out.splitlines() if line.startswith("warning: ")]
    held_out = open_prepared(tmp_path / "data").splits["validation"].sources
    assert [(source.name, source.documents) for source in held_out] == [("prose", 1), ("sums", 1)]  # of 120 and 40
    begins = [
        f"warning: {s.name}: only 1 document with {s.tokens} tokens is held out ({-(-s.tokens // 32)} "
        f"sequence{'s' * (s.tokens > 32)} of "
        "data.seq_len=32): its validation loss says little; "
        for s in held_out
    ]
    assert (
        message[0]
        == begins[0] + "prepare it with data.validation_fraction=0.12, or name held-out text in data.validation"
    )
    assert message[1].startswith(begins[1])
    assert len(message) == 2
    trained = pretrain("train", *tiny_args(tmp_path / "run", f"data.path={tmp_path / 'data'}", *ARGS))
    assert [line for line in trained.out.splitlines() if line.startswith("warning: ")] == message
    assert "by source: prose " in trained.out
    inspected = pretrain("data", "inspect", tmp_path / "data", "data.seq_len=32", "--samples", "0")
    assert [line for line in inspected.out.splitlines() if line.startswith("warning: ")] == message
    assert (
        f"held out, in sequences of 32 tokens: prose {-(-held_out[0].tokens // 32)}, sums "
        f"{-(-held_out[1].tokens // 32)}\n" in inspected.out
    )


def test_named_held_out_text_has_its_loss_in_the_run(
    tmp_path: Path, texts: dict[str, SourceConfig], pretrain: Callable[..., Any], tiny_args: TinyArgs
) -> None:
    prose, sums = (f"[{{kind: text, paths: [{source.paths[0]}]}}]" for source in texts.values())
    args = (
        f"data.sources={prose}",
        f"data.validation={sums}",
        f"data.path={tmp_path / 'data'}",
        "data.vocab_size=300",
    )
    assert pretrain("data", "prepare", *args).code == 0
    answer = pretrain("train", *tiny_args(tmp_path / "run", f"data.path={tmp_path / 'data'}", *ARGS))
    assert (answer.code, answer.err) == (0, "")
    assert "warning" not in answer.out
    assert [list(record.by_source) for record in read_metrics(tmp_path / "run" / "metrics.jsonl").validations] == [
        ["sums"],
        ["sums"],
    ]
    typo = pretrain("data", "prepare", f"data.sources={prose}", "data.validation=[{kind: text, path: [a]}]")
    assert (typo.code, typo.err) == (
        2,
        "error: data.validation.0.path is not a setting; did you mean data.validation.0.paths?\n",
    )
