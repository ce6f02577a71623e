"""A tiny run learns, its records say what was done, and each batch is the slice of the data that the schedule says."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters  # there is no public count of what was compiled

from data_pipeline.reading.loader import Loader
from data_pipeline.reading.packing import Batch
from data_pipeline.storage.shards import open_split
from data_pipeline.tokenizing.tokenizer import load_tokenizer
from parallel.engine import Microbatch
from parallel.engines.torch.engine import TorchEngine
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.errors import Diverged
from pretrain.estimate.flops import parameter_count
from pretrain.optim.schedule import batch_size_at, lr_scale, samples_before
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import Metrics, StepRecord, ValidationRecord
from pretrain.train.batching import split_microbatches, to_host
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> object:
    """report.html has its own tests, and would double the time of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        yield


def read_run(run_dir: Path) -> tuple[Metrics, RunConfig]:
    return read_metrics(run_dir / "metrics.jsonl"), load(run_dir / "config.yaml").config


def losses(run_dir: Path) -> list[float]:
    return [record.loss for record in read_run(run_dir)[0].steps]


def test_a_run_of_150_steps_reaches_the_entropy_of_the_text(tmp_path: Path, run_tiny: RunTiny, tiny_data: Path) -> None:
    """A sentence is three free choices of six. A lower loss would mean that the model sees future tokens."""
    run_tiny(
        tmp_path, "train.steps=150", "train.batch_size=8", "eval.every=50", "eval.batches=100", "checkpoint.every=150"
    )
    validations = read_run(tmp_path)[0].validations
    assert [record.step for record in validations] == [0, 50, 100, 150]
    assert validations[0].val_loss == pytest.approx(math.log(320), abs=0.1)  # an even guess
    shards = open_split(tiny_data / "validation").sources[0]
    sentences = load_tokenizer(tiny_data).decode(shards.tokens(0, shards.n_tokens).tolist()).count(".")
    free = 3 * sentences - shards.n_documents  # the first token of a document is nobody's target
    least = free * math.log(6) / validations[-1].val_tokens
    assert least < validations[-1].val_loss < 1.4 * least < 0.45


def test_records_equal_the_schedules(tmp_path: Path, run_tiny: RunTiny) -> None:
    args = (
        "train.steps=30",
        "train.batch_size=9",
        "train.batch_ramp_steps=20",
        "train.batch_ramp_start=2",
        "train.micro_batch_size=4",
    )
    run_tiny(tmp_path, *args, "optim.schedule=wsd", "optim.decay=0.3", "train.z_loss=0.001")
    metrics, config = read_run(tmp_path)
    assert [record.step for record in metrics.steps] == list(range(1, 31))
    for record in metrics.steps:
        assert record.samples == samples_before(record.step + 1, config.train)
        assert record.tokens == record.samples * 32
        assert record.lr == lr_scale(record.step, 30, config.optim) * 0.01
        assert record.tokens_per_s == pytest.approx(batch_size_at(record.step, config.train) * 32 / record.step_s)
        assert record.mfu is None  # nobody knows the peak of this CPU
        assert record.z_loss is not None
        assert 0 < record.z_loss < 0.1
        assert record.attempt == 1
    assert [metrics.steps[i].samples for i in (0, 19, 29)] == [2, 97, 187]


def test_events_describe_the_run(tmp_path: Path, run_tiny: RunTiny) -> None:
    run_tiny(tmp_path, "train.steps=10", "checkpoint.every=4", "log.samples=['the loop', '']")
    events = read_events(tmp_path / "events.jsonl")
    kinds = [(event.kind, event.step) for event in events]
    assert kinds == [
        ("start", 0),
        ("save", 4),
        ("save", 8),
        ("save", 10),
        ("sample", 10),
        ("sample", 10),
        ("finish", 10),
    ]
    assert [event.prompt for event in events if event.kind == "sample"] == ["the loop", ""]
    assert events[0].parameters == parameter_count(read_run(tmp_path)[1].model)
    assert "No MFU" in (events[0].mfu_statement or "")


class Recorder:
    """Keeps what an observer hears."""

    def __init__(self) -> None:
        self.received: list[tuple[type, int]] = []
        self.closed = 0

    def log(self, record: StepRecord | ValidationRecord) -> None:
        self.received.append((type(record), record.step))

    def close(self) -> None:
        self.closed += 1


def test_an_observer_receives_what_the_file_holds_and_is_closed_once(tmp_path: Path, run_tiny: RunTiny) -> None:
    observer = Recorder()
    run_tiny(tmp_path, "train.steps=12", observers=[observer])
    steps = [(StepRecord, step) for step in range(1, 13)]
    assert observer.received == [
        (ValidationRecord, 0),
        *steps[:10],
        (ValidationRecord, 10),
        *steps[10:],
        (ValidationRecord, 12),
    ]
    assert observer.closed == 1


def test_each_step_trains_on_its_slice_of_the_one_order(
    tmp_path: Path, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    train_step = TorchEngine.train_step

    def spy(self: TorchEngine, microbatches: list, lr_scale: float, **more: object) -> object:
        assert all(len(microbatch.input_ids) == 3 for microbatch in microbatches)
        labels = torch.cat([microbatch.labels for microbatch in microbatches])
        n_rows = int((labels != -100).any(dim=1).sum())
        assert len(labels) < n_rows + 3  # what fills up is less than one microbatch, and stands behind the rest
        assert (labels[n_rows:] == -100).all()
        seen.append(torch.cat([microbatch.input_ids for microbatch in microbatches])[:n_rows])
        return train_step(self, microbatches, lr_scale, **more)

    monkeypatch.setattr(TorchEngine, "train_step", spy)
    args = (
        "train.batch_size=7",
        "train.batch_ramp_steps=12",
        "train.batch_ramp_start=1",
        "train.micro_batch_size=3",
        "train.steps=20",
    )
    run_tiny(tmp_path, *args)
    config = read_run(tmp_path)[1]
    assert [len(ids) for ids in seen] == [batch_size_at(step, config.train) for step in range(1, 21)]
    total = samples_before(21, config.train)
    whole = Loader(config.data.path / "train", seq_len=32, seed=config.run.seed).batch(0, total)
    assert torch.equal(torch.cat(seen), torch.from_numpy(whole.input_ids).long())


def test_validation_reads_the_same_held_out_sequences_each_time(
    tmp_path: Path, run_tiny: RunTiny, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    eval_step = TorchEngine.eval_step

    def spy(self: TorchEngine, microbatches: Sequence[Microbatch]) -> tuple[float, int]:
        seen.extend((microbatch.n_targets, microbatch.input_ids) for microbatch in microbatches)
        return eval_step(self, microbatches)

    monkeypatch.setattr(TorchEngine, "eval_step", spy)
    run_tiny(tmp_path, "train.steps=10", "eval.every=5", "eval.batches=2", "train.micro_batch_size=3")
    rows = (
        torch.cat([ids for _, ids in seen]).view(3, 2, 6, 32)[:, :, :4].reshape(3, 8, 32)
    )  # batches of 4, in two microbatches of 3
    loader = Loader(tiny_data / "validation", seq_len=32, seed=0)
    (name,) = loader.sizes
    held_out = loader.sequential(name, 0, 8)
    assert all(torch.equal(each, torch.from_numpy(held_out.input_ids).long()) for each in rows)
    assert {record.val_tokens for record in read_run(tmp_path)[0].validations} == {int((held_out.labels != -100).sum())}


def test_the_curve_does_not_depend_on_the_microbatch_to_1e5(tmp_path: Path, run_tiny: RunTiny) -> None:
    for size in (1, 3, 8):
        run_tiny(tmp_path / str(size), "train.steps=10", "train.batch_size=8", f"train.micro_batch_size={size}")
    one, three, eight = (losses(tmp_path / str(size)) for size in (1, 3, 8))
    assert one == pytest.approx(eight, rel=1e-5)
    assert three == pytest.approx(eight, rel=1e-5)


def test_another_seed_is_another_run_and_the_same_seed_the_same(tmp_path: Path, run_tiny: RunTiny) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_tiny(tmp_path / name, "train.steps=5", f"run.seed={seed}")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert not set(losses(tmp_path / "a")) & set(losses(tmp_path / "c"))


@pytest.mark.parametrize("args", [(), ("model.document_mask=false",)], ids=["masked", "not masked"])
def test_tokens_see_only_their_document_unless_told_otherwise(
    tmp_path: Path, run_tiny: RunTiny, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first validation is the same number when every document but its last in a row is garbled, or it is not."""

    def garbled(self: Loader, source: str, first: int, count: int) -> Batch:
        batch = sequential(self, source, first, count)
        batch = replace(batch, input_ids=batch.input_ids.copy(), labels=batch.labels.copy())
        earlier = batch.document_ids < batch.document_ids.max(axis=1, keepdims=True)
        batch.labels[earlier] = -100
        if garble:
            batch.input_ids[earlier] = 1
        return batch

    sequential = Loader.sequential
    monkeypatch.setattr(Loader, "sequential", garbled)
    values = []
    for garble in (False, True):
        run_tiny(
            tmp_path / str(garble), "train.steps=5", "eval.every=5", "eval.batches=100", "model.init_std=0.3", *args
        )
        values.append(read_run(tmp_path / str(garble))[0].validations[0].val_loss)
    if args:
        assert abs(values[0] - values[1]) > 1e-3
    else:
        assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_tensorboard_receives_the_same_numbers(tmp_path: Path, run_tiny: RunTiny) -> None:
    run_tiny(tmp_path, "train.steps=6", "eval.every=3", "log.tensorboard=true")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    metrics = read_run(tmp_path)[0]
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (r.step, pytest.approx(r.loss, rel=1e-6)) for r in metrics.steps
    ]
    assert [e.step for e in board.Scalars("validation/loss")] == [0, 3, 6]


def test_a_run_without_held_out_documents_trains_without_validation(
    tmp_path: Path, run_tiny: RunTiny, tiny_text: Path, pretrain: Callable
) -> None:
    source = f"data.sources=[{{kind: text, paths: [{tiny_text}]}}]"
    assert (
        pretrain(
            "data",
            "prepare",
            source,
            f"data.path={tmp_path / 'data'}",
            "data.validation_fraction=0",
            "data.vocab_size=300",
        ).code
        == 0
    )
    run_tiny(tmp_path / "run", f"data.path={tmp_path / 'data'}", "train.steps=5")
    metrics, _ = read_run(tmp_path / "run")
    assert (len(metrics.steps), metrics.validations) == (5, [])


def test_feed_cuts_a_batch_and_counts_the_targets(tiny_data: Path) -> None:
    batch, cpu = Loader(tiny_data / "train", seq_len=32, seed=0).batch(0, 9), torch.device("cpu")
    parts = list(split_microbatches(to_host(batch, cpu), 3, cpu))
    assert [len(part.input_ids) for part in parts] == [3, 3, 3]
    assert torch.equal(torch.cat([part.labels for part in parts]), torch.from_numpy(batch.labels).long())
    assert [part.n_targets for part in parts] == [int((part.labels != -100).sum()) for part in parts]


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The loss of that step is NaN."""
    train_step, count = TorchEngine.train_step, iter(range(1, 1000))

    def poisoned(self: TorchEngine, microbatches: list, lr_scale: float, **more: object) -> object:
        compute = self._runner._forward_step
        if next(count) == step:
            self._runner._forward_step = lambda *given: type(out := compute(*given))(
                *(part * torch.nan for part in out)
            )
        try:
            return train_step(self, microbatches, lr_scale, **more)
        finally:
            self._runner._forward_step = compute

    monkeypatch.setattr(TorchEngine, "train_step", poisoned)


def test_a_nan_ends_the_run_and_the_newest_checkpoint_is_from_before(
    tmp_path: Path, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 8)
    with pytest.raises(
        Diverged, match="loss nan and gradient norm nan at step 8: the run diverged, and this step was not taken"
    ):
        run_tiny(tmp_path, "train.steps=20", "checkpoint.every=5")
    assert [(event.kind, event.step) for event in read_events(tmp_path / "events.jsonl")] == [
        ("start", 0),
        ("save", 5),
        ("stop", 8),
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005"]


def test_a_diverged_run_is_one_line_and_exit_code_1(
    tmp_path: Path, tiny_args: Callable[..., list[str]], pretrain: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 3)
    answer = pretrain("train", *tiny_args(tmp_path, "train.steps=10"))
    assert answer.code == 1
    assert answer.err == (
        "error: loss nan and gradient norm nan at step 3: the run diverged, and this step was not taken. In "
        "another run.dir, lower "
        "optim.lr=0.01, lengthen optim.warmup=4 or set train.z_loss=1e-4\n"
    )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)
def test_compiled_and_eager_losses_agree_to_1e5(tmp_path: Path, run_tiny: RunTiny, tiny_data: Path) -> None:
    """Five graphs: the softmax of the loss, and a block and the norm with gradients and without."""
    args = (f"data.path={tiny_data}", "model.n_layers=1", "train.batch_size=12", "train.steps=5")
    torch.compiler.reset()
    compiled_before = counters["stats"]["unique_graphs"]
    run_tiny(tmp_path / "eager", *args, "train.attention=sdpa")
    assert counters["stats"]["unique_graphs"] == compiled_before
    run_tiny(tmp_path / "compiled", *args, "train.compile=true")
    assert counters["stats"]["unique_graphs"] == compiled_before + 5
    assert read_run(tmp_path / "compiled")[1].train.attention == "blocked"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)
