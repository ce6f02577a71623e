"""Longer sequences later, mixtures that change: what a run reads, and what may change on resume."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare
from data_pipeline.reading.loader import Loader
from data_pipeline.settings import MixtureConfig, PrepareConfig, SourceConfig
from parallel.engines.torch.engine import TorchEngine
from pretrain.config.loading import load
from pretrain.errors import UserError
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import StepRecord
from pretrain.setup.batch_schedule import BatchSchedule, check_seq_lens
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]


def schedule_of(*args: str) -> BatchSchedule:
    config = load(None, ["data.seq_len=32", "train.steps=10", "train.batch_size=8", *args]).config
    return BatchSchedule.from_config(config.data, config.train)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tokens of each training step."""
    seen: list[torch.Tensor] = []
    train_step = TorchEngine.train_step

    def spy(self: TorchEngine, microbatches: list, lr_scale: float, **more: object) -> object:
        seen.append(torch.cat([microbatch.input_ids for microbatch in microbatches]))
        return train_step(self, microbatches, lr_scale, **more)

    monkeypatch.setattr(TorchEngine, "train_step", spy)
    return seen


def test_the_length_is_a_function_of_the_step() -> None:
    schedule = schedule_of("data.seq_len_schedule=[{from: 50%, seq_len: 64}, {from: 72, seq_len: 256}]")
    check_seq_lens(schedule)
    assert [schedule.seq_len_at(8 * step) for step in range(10)] == [32] * 5 + [64] * 4 + [256]
    assert schedule.longest_seq_len == 256
    assert schedule_of().longest_seq_len == 32


def test_a_stage_begins_with_the_first_whole_step_after_its_start() -> None:
    schedule = schedule_of(
        "data.seq_len_schedule=[{from: 41, seq_len: 64}]"
    )  # sample 41 lies in step 6, samples 40 to 48
    assert [schedule.seq_len_at(8 * step) for step in (4, 5, 6)] == [32, 32, 64]


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (
            ["data.seq_len_schedule=[{from: 50%, seq_len: 48}]"],
            "data.seq_len_schedule.0.seq_len=48 is not a multiple of the 32 before it",
        ),
        (
            ["data.seq_len_schedule=[{from: 50%, seq_len: 64}, {from: 20%, seq_len: 128}]"],
            "data.seq_len_schedule.1.from=20% lies before the stage in front",
        ),
        (
            ["data.seq_len_schedule=[{from: 50%, seq_len: 96}]"],
            "data.seq_len_schedule.0: a batch of train.batch_size=8 sequences of data.seq_len=32",
        ),
        (
            ["data.seq_len_schedule=[{from: 50%, seq_len: 64}]", "data.window=96"],
            "data.window=96 is not a multiple of the longest sequence, 64",
        ),
        (
            ["data.seq_len_schedule=[{from: 1, seq_len: 64}]", "train.batch_ramp_steps=5", "train.batch_ramp_start=2"],
            "data.seq_len_schedule.0.from=1 lies in the batch ramp of 5 steps: let sequences grow after it",
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(args: list[str], answer: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_seq_lens(schedule_of(*args))
    assert str(refusal.value).startswith(answer)


def test_a_batch_may_not_be_less_than_a_window_whose_end_may_be_padding() -> None:
    check_seq_lens(schedule_of("data.window=256"))
    with pytest.raises(
        UserError, match=r"a batch of 8 sequences of data\.seq_len=32 is less than a window of 288 tokens"
    ):
        check_seq_lens(schedule_of("data.window=288"))


def test_another_batch_size_goes_on_at_the_sequence_where_the_run_stopped(
    tmp_path: Path, run_tiny: RunTiny, tiny_data: Path, seen: list[torch.Tensor]
) -> None:
    args = ("train.steps=12", "run.seed=5")
    assert run_tiny(tmp_path, *args, "train.batch_size=4", observers=[StopAfter(5)]) is Outcome.STOPPED
    assert run_tiny(tmp_path, *args, "train.batch_size=6", observers=[StopAfter(8)]) is Outcome.STOPPED
    assert run_tiny(tmp_path, *args, "train.batch_size=2") is Outcome.FINISHED
    assert [len(ids) for ids in seen] == [4] * 5 + [6] * 3 + [2] * 4
    whole = Loader(tiny_data / "train", seq_len=32, seed=5).batch(0, 46)
    assert torch.equal(torch.cat(seen), torch.from_numpy(whole.input_ids).long())
    assert [record.samples for record in read_metrics(tmp_path / "metrics.jsonl").steps] == [
        4,
        8,
        12,
        16,
        20,
        26,
        32,
        38,
        40,
        42,
        44,
        46,
    ]


def test_a_growing_run_reads_the_same_tokens_in_the_same_order(
    tmp_path: Path, run_tiny: RunTiny, tiny_data: Path, seen: list[torch.Tensor]
) -> None:
    """Every window once, short sequences first; the batches hold as many tokens throughout."""
    args = (
        "train.steps=6",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "data.seq_len_schedule=[{from: 50%, seq_len: 64}]",
        "run.seed=3",
    )
    run_tiny(tmp_path, *args)
    assert [tuple(ids.shape) for ids in seen] == [(8, 32)] * 3 + [(4, 64)] * 3
    whole = Loader(tiny_data / "train", seq_len=64, seed=3).batch(0, 24)
    assert torch.equal(torch.cat([ids.reshape(-1, 64) for ids in seen]), torch.from_numpy(whole.input_ids).long())
    records = read_metrics(tmp_path / "metrics.jsonl").steps
    assert [record.tokens for record in records] == [256 * step for step in range(1, 7)]
    alone = Loader(tiny_data / "train", seq_len=32, seed=3).batch(
        0, 48
    )  # negative control: without the window it is another order
    assert not torch.equal(torch.cat([ids.reshape(-1, 32) for ids in seen]), torch.from_numpy(alone.input_ids).long())


@pytest.fixture(scope="module")
def two_sources(tiny_text: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "data"
    sources = tuple(
        SourceConfig(name=name, kind="text", paths=(f"{tiny_text}/{glob}",))
        for name, glob in (("a", "[01]*"), ("b", "2*"))
    )
    config = PrepareConfig(sources=sources, tokenizer=tiny_data / "tokenizer.json", validation_fraction=0.0, workers=1)
    prepare(path, config)
    return path


class StopAfter:
    """SIGINT after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, record: object) -> None:
        if isinstance(record, StepRecord) and record.step == self.step:
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None:
        pass


def test_a_stage_may_be_appended_when_a_run_goes_on_but_its_past_may_not_change(
    tmp_path: Path, run_tiny: RunTiny, two_sources: Path, seen: list[torch.Tensor]
) -> None:
    even, later = '"by": "tokens", "weights": {"a": 1, "b": 1}', '"stages": [{"from": 60, "weights": {"a": 1, "b": 9}}]'
    args = (f"data.path={two_sources}", "train.steps=20", "train.batch_size=4", "run.seed=5")
    assert run_tiny(tmp_path, *args, f"data.mixture={{{even}}}", observers=[StopAfter(10)]) is Outcome.STOPPED
    with pytest.raises(
        UserError,
        match=r"another order than run\.seed, data\.mixture, data\.seq_len_schedule and data\.window give now",
    ):
        run_tiny(tmp_path, *args, 'data.mixture={"by": "tokens", "weights": {"a": 1, "b": 2}}')
    assert run_tiny(tmp_path, *args, f"data.mixture={{{even}, {later}}}") is Outcome.FINISHED
    mixture = MixtureConfig.model_validate(yaml.safe_load(f"{{{even}, {later}}}"))
    whole = Loader(two_sources / "train", seq_len=32, seed=5, mixture=mixture, total_samples=80)
    assert torch.equal(torch.cat(seen), torch.from_numpy(whole.batch(0, 80).input_ids).long())
    started = next(event.text for event in read_events(tmp_path / "events.jsonl") if event.kind == "start")
    assert "a " in started
    assert "epochs" in started


def test_a_longer_run_moves_stages_given_as_shares_only_before_they_begin(
    tmp_path: Path, run_tiny: RunTiny, two_sources: Path, seen: list[torch.Tensor]
) -> None:
    stage = '"stages": [{"from": "50%", "weights": {"a": 1, "b": 9}}]'
    mixture = f'data.mixture={{"by": "tokens", "weights": {{"a": 1, "b": 1}}, {stage}}}'
    args = (f"data.path={two_sources}", "train.batch_size=4", "run.seed=5", "optim.schedule=constant", mixture)
    assert run_tiny(tmp_path, *args, "train.steps=20", observers=[StopAfter(8)]) is Outcome.STOPPED
    assert run_tiny(tmp_path, *args, "train.steps=24", observers=[StopAfter(16)]) is Outcome.STOPPED  # from 40 to 48
    settings = MixtureConfig.model_validate(yaml.safe_load(mixture.removeprefix("data.mixture=")))
    whole = Loader(two_sources / "train", seq_len=32, seed=5, mixture=settings, total_samples=96)
    assert torch.equal(torch.cat(seen), torch.from_numpy(whole.batch(0, 64).input_ids).long())
    with pytest.raises(
        UserError, match=r"read its first 64 sequences in another order .* a share such as 80% moves with train\.steps"
    ):
        run_tiny(tmp_path, *args, "train.steps=40")


def test_more_epochs_than_allowed_are_refused_before_anything_is_written(
    tmp_path: Path, run_tiny: RunTiny, two_sources: Path
) -> None:
    args = (f"data.path={two_sources}", "train.steps=200", "train.batch_size=8", "data.mixture.max_epochs=1")
    with pytest.raises(DataError, match=r"the run would read [ab] .* times, more than data\.mixture\.max_epochs=1"):
        run_tiny(tmp_path / "run", *args)
    assert not (tmp_path / "run").exists()
