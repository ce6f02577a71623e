"""A run made longer, or started from another run's checkpoint, gives the same digits as an uninterrupted run."""

import io
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from data_pipeline.prepare import prepare
from data_pipeline.settings import PrepareConfig, SourceConfig
from pretrain.checkpoint.directory import checkpoint_path
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config.loading import load
from pretrain.config.saved import read_config
from pretrain.errors import UserError
from pretrain.report.run_page import write_report
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.setup.engine import build_engine
from pretrain.train.init_from import find_init_checkpoint
from pretrain.train.loop import Outcome
from pretrain.train.run import train as train_run

RunTiny = Callable[..., Outcome]
TinyArgs = Callable[..., list[str]]
Pretrain = Callable[..., object]

CONSTANT = ("optim.schedule=constant", "checkpoint.every=10")
WSD = ("optim.schedule=wsd", "checkpoint.every=8")


class StopAfter:
    """Asks the run to stop after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, record: object) -> None:
        if getattr(record, "step", None) == self.step and hasattr(record, "loss"):
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> object:
    """report.html has its own tests, and would double the time of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.run.write_report", lambda _: None)
        yield


def curve(run_dir: Path) -> list[tuple[int, float, float, int]]:
    """(step, loss, gradient norm, sequences read) of every step."""
    return [(r.step, r.loss, r.grad_norm, r.samples) for r in read_metrics(run_dir / "metrics.jsonl").steps]


def validations(run_dir: Path) -> dict[int, float]:
    return {r.step: r.val_loss for r in read_metrics(run_dir / "metrics.jsonl").validations}


def state_at(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer state in the checkpoint of a step."""
    state = build_engine(load(run_dir / "config.yaml").config).state()
    load_checkpoint(checkpoint_path(run_dir / "checkpoints", step), state)
    flat = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    return flat | {
        f"{name}.{slot}": tensor for name, slots in state["optimizer"].items() for slot, tensor in slots.items()
    }


def assert_same_end(ours: Path, theirs: Path, step: int) -> None:
    assert curve(ours) == curve(theirs)
    a, b = state_at(ours, step), state_at(theirs, step)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        run()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Longer


@pytest.mark.parametrize(
    "args",
    [["optim.schedule=constant"], ["optim.schedule=inverse_sqrt"], ["optim.schedule=wsd", "optim.decay=0"]],
)
def test_a_finished_run_made_longer_is_the_run_that_was_as_long_from_the_start(
    tmp_path: Path,
    run_tiny: RunTiny,
    args: list[str],
) -> None:
    args = [*args, "checkpoint.every=10"]
    run_tiny(tmp_path / "whole", *args, "train.steps=20")
    run_tiny(tmp_path / "run", *args, "train.steps=10")
    assert run_tiny(tmp_path / "run", *args, "train.steps=20") is Outcome.FINISHED
    assert_same_end(tmp_path / "run", tmp_path / "whole", 20)
    reported = [
        (e.kind, e.step)
        for e in read_events(tmp_path / "run" / "events.jsonl")
        if e.kind in ("settings", "resume", "finish")
    ]
    assert reported == [("finish", 10), ("settings", None), ("resume", 10), ("finish", 20)]
    settings = next(e.text for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "settings")
    assert settings == "train.steps: 10 in the run, 20 now"
    assert read_config(tmp_path / "run" / "config.yaml").train.steps == 20


def test_a_longer_run_that_was_killed_before_its_finish_event_records_it_on_resume(
    tmp_path: Path, run_tiny: RunTiny
) -> None:
    """The end that it reported when it was shorter is not taken for this one."""
    run_tiny(tmp_path, *CONSTANT, "train.steps=10")
    run_tiny(tmp_path, *CONSTANT, "train.steps=12")
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    assert '"finish"' in lines[-1]
    (tmp_path / "events.jsonl").write_text("".join(lines[:-1]))
    run_tiny(tmp_path, *CONSTANT, "train.steps=12")
    reported = [(e.kind, e.step) for e in read_events(tmp_path / "events.jsonl") if e.kind in ("resume", "finish")]
    assert reported == [("finish", 10), ("resume", 10), ("resume", 12), ("finish", 12)]


def test_auto_warmup_stays_what_it_was_when_a_run_is_made_longer(tmp_path: Path, run_tiny: RunTiny) -> None:
    """Auto warm-up is a tenth: 2 of 20 steps, 1 of 10. The longer run keeps 1, because its first steps used that."""
    args = ("optim.schedule=constant", "optim.warmup=auto")
    run_tiny(tmp_path, *args, "train.steps=10")
    run_tiny(tmp_path, *args, "train.steps=20")
    assert read_config(tmp_path / "config.yaml").optim.warmup == 1


def test_wsd_is_made_longer_before_its_decay_and_refused_in_it(tmp_path: Path, run_tiny: RunTiny) -> None:
    """Of 20 steps the last 4 decay."""
    run_tiny(tmp_path / "run", *WSD, "train.steps=20", observers=[StopAfter(16)])
    shutil.copytree(tmp_path / "run", tmp_path / "later")
    run_tiny(tmp_path / "whole", *WSD, "train.steps=30")
    assert run_tiny(tmp_path / "run", *WSD, "train.steps=30") is Outcome.FINISHED
    assert_same_end(tmp_path / "run", tmp_path / "whole", 30)

    later = tmp_path / "later"
    run_tiny(later, *WSD, "train.steps=20", observers=[StopAfter(18)])
    before = contents(later)
    assert refusal(lambda: run_tiny(later, *WSD, "train.steps=30")) == (
        f"train.steps: 20 in the run, 30 now: of the 18 steps that run.dir={later} has taken, step 17 had the "
        "learning rate 0.00775 and would have had 0.01 (the decay of optim.schedule=wsd began at step 17 of 20). Put "
        f"the old value back; or begin another run.dir from these weights with run.init_from={later}, or before that "
        f"step with run.init_from={later}@16 run.init_mode=full"
    )
    assert contents(later) == before
    # the way out that it names:
    run_tiny(tmp_path / "branch", *WSD, "train.steps=30", f"run.init_from={later}@16", "run.init_mode=full")
    assert curve(tmp_path / "branch") == curve(tmp_path / "whole")[16:]


@pytest.mark.parametrize(
    ("first", "then", "reported"),
    [
        (
            ("optim.schedule=cosine",),
            ("optim.schedule=cosine", "train.steps=20"),
            "train.steps: 10 in the run, 20 now: of the 10 steps that run.dir={run} has taken, step 5 had the "
            "learning rate 0.00939711 and would have had 0.00991353 (optim.schedule=cosine falls over all of "
            "train.steps=10). Put the old value back; or begin another run.dir from these weights with "
            "run.init_from={run}",
        ),
        (
            ("optim.schedule=linear",),
            ("optim.schedule=linear", "train.steps=20"),
            "step 5 had the learning rate 0.0085 and would have had 0.0094375 (optim.schedule=linear falls over "
            "all of train.steps=10)",
        ),
        (CONSTANT, (*CONSTANT, "optim.lr=0.02"), "optim.lr: 0.01 in the run, 0.02 now: of the 10 steps"),
        (
            CONSTANT,
            (*CONSTANT, "optim.lr=0.02"),
            "step 1 had the learning rate 0.0025 and would have had 0.005 (because of optim.lr). Put the old "
            "value back",
        ),
        (CONSTANT, (*CONSTANT, "optim.warmup=3"), "would have had 0.00333333 (because of optim.warmup)."),
        (  # not because of train.steps
            ("optim.schedule=cosine", "train.batch_ramp_steps=4", "train.micro_batch_size=1"),
            ("optim.schedule=cosine", "train.batch_ramp_steps=4", "train.micro_batch_size=1", "optim.lr=0.02"),
            "step 1 had the learning rate 0.0025 and would have had 0.005 (because of optim.lr). Put",
        ),
        (  # both differ at step 5, the first one after the warm-up
            ("optim.schedule=cosine",),
            ("optim.schedule=linear", "optim.min_lr_ratio=0.2", "optim.decay_shape=sqrt", "train.batch_size=2"),
            "would have had 0.00866667 (because of optim.schedule and optim.min_lr_ratio). Put",
        ),
        (
            ("optim.schedule=cosine", "train.batch_ramp_steps=4", "train.micro_batch_size=1"),
            ("optim.schedule=cosine", "train.batch_ramp_steps=8", "train.micro_batch_size=1"),
            "step 3 had a batch of 2 sequences and would have had one of 1. Put",
        ),
        (
            CONSTANT,
            (*CONSTANT, "train.steps=9"),
            "train.steps=9 is below the 10 steps that run.dir={run} has already taken: set 10 or more",
        ),
        (
            (*CONSTANT, "train.batch_ramp_steps=4", "train.batch_ramp_start=2", "train.micro_batch_size=2"),
            (*CONSTANT, "train.batch_ramp_steps=8", "train.batch_ramp_start=2", "train.micro_batch_size=2"),
            "of the 10 steps that run.dir={run} has taken, step 3 had a batch of 3 sequences and would have had "
            "one of 2.",
        ),
        (
            (*CONSTANT, "data.seq_len_schedule=[{from: 50%, seq_len: 64}]"),
            (*CONSTANT, "data.seq_len_schedule=[{from: 50%, seq_len: 64}]", "train.steps=20"),
            "data.seq_len_schedule: the 40 sequences read so far had 32 tokens from sequence 0 on, 64 tokens "
            "from sequence 20 "
            "on, and would have had 32 tokens from sequence 0 on; a share of the run such as 80% moves with "
            "train.steps and train.batch_size: write the stages that have begun as numbers of sequences of "
            "data.seq_len tokens, from: 20",
        ),
    ],
)
def test_a_schedule_that_the_steps_taken_did_not_follow_is_refused_with_the_reason(
    tmp_path: Path, run_tiny: RunTiny, first: tuple[str, ...], then: tuple[str, ...], reported: str
) -> None:
    run_tiny(tmp_path, "train.steps=10", *first)
    before = contents(tmp_path)
    message = refusal(lambda: run_tiny(tmp_path, "train.steps=10", *then))
    assert reported.format(run=tmp_path) in message
    assert contents(tmp_path) == before


def test_a_cosine_run_in_its_warmup_may_be_made_longer(tmp_path: Path, run_tiny: RunTiny) -> None:
    run_tiny(tmp_path / "whole", "train.steps=12")
    run_tiny(tmp_path / "run", "train.steps=10", observers=[StopAfter(4)])
    run_tiny(tmp_path / "run", "train.steps=12")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_stages_by_numbers_of_sequences_may_be_followed_by_more_steps(tmp_path: Path, run_tiny: RunTiny) -> None:
    args = (*CONSTANT, "data.seq_len_schedule=[{from: 20, seq_len: 64}]")
    run_tiny(tmp_path / "whole", *args, "train.steps=20")
    run_tiny(tmp_path / "run", *args, "train.steps=10")
    run_tiny(tmp_path / "run", *args, "train.steps=20")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_constant_run_may_end_in_the_decay_of_wsd(tmp_path: Path, run_tiny: RunTiny) -> None:
    """`optim.decay=auto` takes the value of wsd, not the one saved for another schedule: 10 stable steps, then 5."""
    run_tiny(tmp_path / "run", *CONSTANT, "train.steps=10")
    run_tiny(tmp_path / "run", "optim.schedule=wsd", "checkpoint.every=10", "train.steps=12")
    run_tiny(tmp_path / "whole", "optim.schedule=wsd", "train.steps=12")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert read_config(tmp_path / "run" / "config.yaml").optim.decay == 0.2
    assert read_metrics(tmp_path / "run" / "metrics.jsonl").steps[-1].lr == pytest.approx(0.001)


def test_a_run_without_a_step_that_counts_may_change_its_schedule(tmp_path: Path, run_tiny: RunTiny) -> None:
    """Killed before its first checkpoint, it begins again: no step was taken."""
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "run", observers=[StopAfter(3), StopAfter(3)])
    run_tiny(tmp_path / "run", "train.steps=10", "optim.lr=0.02")
    run_tiny(tmp_path / "whole", "train.steps=10", "optim.lr=0.02")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_validation_may_change_on_resume_and_no_loss_does(tmp_path: Path, run_tiny: RunTiny) -> None:
    run_tiny(tmp_path / "whole", "train.steps=20")
    run_tiny(tmp_path / "run", "train.steps=20", observers=[StopAfter(10)])
    run_tiny(
        tmp_path / "run",
        "train.steps=20",
        "eval.every=3",
        "eval.batches=1",
        "model.max_seq_len=128",
        "model.preset=tiny",
        *SHAPE,
    )
    assert_same_end(tmp_path / "run", tmp_path / "whole", 20)
    assert set(validations(tmp_path / "run")) == {0, 10, 12, 15, 18, 20}
    text = next(e.text for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "settings")
    assert "eval.every: 10 in the run, 3 now; eval.batches: 2 in the run, 1 now" in text


# From another run's checkpoint

SHAPE = (
    "model.n_layers=2",
    "model.d_model=32",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.d_ff=64",
    "model.tie_embeddings=false",
)


@pytest.fixture(scope="module")
def parent(run_tiny: RunTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with checkpoints of 10 and 20. No test writes here, and no run either: see the last fixture."""
    path = tmp_path_factory.mktemp("parent") / "run"
    assert run_tiny(path, "train.steps=20", "checkpoint.every=10") is Outcome.FINISHED
    return path


@pytest.fixture(autouse=True)
def _parent_is_only_read(request: pytest.FixtureRequest) -> object:
    before = contents(request.getfixturevalue("parent"))
    yield
    assert contents(request.getfixturevalue("parent")) == before


@pytest.fixture
def child(tiny_args: TinyArgs, tiny_data: Path) -> Callable[..., list[str]]:
    """Words of a run that begins from another one: all but the model, which is that run's."""

    def args(run_dir: Path, init_from: object, *more: str) -> list[str]:
        mine = [arg for arg in tiny_args(run_dir) if not arg.startswith("model.")]
        return [*mine, "optim.warmup=1", f"run.init_from={init_from}", *more]

    return args


@pytest.fixture
def train(child: Callable[..., list[str]]) -> Callable[..., Outcome]:
    def start(run_dir: Path, init_from: object, *more: str, observers: tuple[object, ...] = ()) -> Outcome:
        return train_run(load(None, child(run_dir, init_from, *more)).config, Console(file=io.StringIO()), observers)

    return start


def test_full_with_the_same_settings_has_the_losses_that_the_run_would_have_had(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    train(tmp_path, f"{parent}@10", "run.init_mode=full", "train.steps=20", "optim.warmup=4")
    assert curve(tmp_path) == curve(parent)[10:]
    assert validations(tmp_path) == {step: loss for step, loss in validations(parent).items() if step >= 10}
    ours, theirs = state_at(tmp_path, 20), state_at(parent, 20)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_branch_made_longer_answers_for_its_own_steps_alone(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    """Under its own settings the first steps, which the other run took, would have warmed up otherwise."""
    args = ("run.init_mode=full", "optim.schedule=constant")
    train(tmp_path, f"{parent}@10", *args, "optim.warmup=4", "train.steps=14")
    train(tmp_path, f"{parent}@10", *args, "optim.warmup=8", "train.steps=16")
    assert [step for step, *_ in curve(tmp_path)] == list(range(11, 17))
    reported = refusal(lambda: train(tmp_path, f"{parent}@10", *args, "optim.warmup=12", "train.steps=20"))
    assert "step 11 had the learning rate 0.01 and would have had 0.00916667" in reported


def test_full_continues_with_other_settings(tmp_path: Path, parent: Path, train: Callable[..., Outcome]) -> None:
    """Another learning rate, batch size and length; the data goes on at the sequence where the other run stopped."""
    train(tmp_path, f"{parent}@10", "run.init_mode=full", "train.steps=13", "train.batch_size=6", "optim.lr=0.002")
    assert [(step, samples) for step, _, _, samples in curve(tmp_path)] == [(11, 46), (12, 52), (13, 58)]
    started = next(e for e in read_events(tmp_path / "events.jsonl") if e.kind == "start")
    generation = read_manifest(checkpoint_path(parent / "checkpoints", 10)).generation
    assert started.step == 10
    assert started.text.endswith(
        f"; from {parent}@10 (generation {generation}): weights, optimizer, and data from sequence 40 on; learning "
        "rate 0.007222 at step 10 there, 0.0003206 at step 11 here"
    )


def test_weights_start_at_the_validation_loss_of_the_checkpoint(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    train(tmp_path, parent, "train.steps=3", "run.seed=5", "optim.kind=muon")
    assert validations(tmp_path)[0] == validations(parent)[20]
    assert [(step, samples) for step, _, _, samples in curve(tmp_path)] == [(1, 4), (2, 8), (3, 12)]
    assert validations(tmp_path)[0] < validations(parent)[0] - 1  # negative control: initial weights are elsewhere


def test_ancestry_is_written_everywhere_and_reaches_back_to_the_first(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(first, f"{parent}@10", "run.init_mode=full", "train.steps=12")
    train(second, first, "train.steps=2")
    made = [read_manifest(checkpoint_path(run / "checkpoints", step)) for run, step in ((first, 12), (parent, 10))]
    expected = [
        (str(first), 12, 48, "weights", made[0].generation),
        (str(parent), 10, 40, "full", made[1].generation),
    ]
    config = read_config(second / "config.yaml")
    assert config.run.init_from == f"{first}@12"
    assert [(a.run, a.step, a.samples, a.mode, a.generation) for a in config.run.ancestry] == expected
    assert len({a.config for a in config.run.ancestry}) == 2
    saved = read_manifest(checkpoint_path(second / "checkpoints", 2)).config["run"]["ancestry"]
    assert saved == config.model_dump(mode="json")["run"]["ancestry"]
    start = next(e.text for e in read_events(second / "events.jsonl") if e.kind == "start")
    assert start.endswith(f"; from the weights of {first}@12 (generation {made[0].generation})")
    page = write_report(second).read_text()
    card = page[page.index("Started from") :]
    assert card.index(str(first)) < card.index(str(parent))
    assert all(manifest.generation in card for manifest in made)


def test_a_run_resumes_from_its_own_checkpoints_when_the_other_run_is_gone(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    gone = shutil.copytree(parent, tmp_path / "gone")
    args = ("run.init_mode=full", "train.steps=20")
    train(tmp_path / "run", gone, "train.steps=20", observers=(StopAfter(7),))
    train(tmp_path / "whole", gone, "train.steps=20")
    shutil.rmtree(gone)
    assert train(tmp_path / "run", gone, "train.steps=20") is Outcome.FINISHED  # the very same command
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    kinds = [(e.kind, e.step) for e in read_events(tmp_path / "run" / "events.jsonl")]
    assert kinds == [("start", 0), ("save", 7), ("stop", 7), ("resume", 7), ("save", 20), ("finish", 20)]
    reported = refusal(lambda: train(tmp_path / "run", parent, *args))
    assert f"run.init_from: {gone}@20 in the run, {parent} now" in reported


def test_a_run_that_began_from_another_resumes_where_init_from_is_left_out(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome], child: Callable[..., list[str]]
) -> None:
    gone = shutil.copytree(parent, tmp_path / "gone")
    train(tmp_path / "run", f"{gone}@10", "train.steps=6", observers=(StopAfter(3),))
    shutil.rmtree(gone)
    args = [arg for arg in child(tmp_path / "run", "", "train.steps=6") if not arg.startswith("run.init_from")]
    assert train_run(load(None, args).config, Console(file=io.StringIO())) is Outcome.FINISHED
    assert read_config(tmp_path / "run" / "config.yaml").run.init_from == f"{gone}@10"
    train(tmp_path / "whole", f"{parent}@10", "train.steps=6")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("end", ["model:", "data:", "log:"])
def test_a_truncated_config_of_the_parent_run_is_reported(
    tmp_path: Path, parent: Path, child: Callable[..., list[str]], end: str
) -> None:
    text = (parent / "config.yaml").read_text()
    (tmp_path / "parent").mkdir()
    cut = tmp_path / "parent" / "config.yaml"
    cut.write_text(text[: text.index(f"\n{end}") + 1])
    reported = f"{cut} is cut short: it ends before its last section, log. Restore it"
    assert refusal(lambda: load(None, child(tmp_path / "run", cut.parent))).startswith(reported)
    assert refusal(lambda: load(None, child(cut.parent, parent))).startswith(reported)
    assert load(None, [f"run.dir={cut.parent}"]).config.model == load(None).config.model  # of commands that need no run
    cut.write_text(text)
    assert load(None, child(tmp_path / "run", cut.parent)).config.model.n_layers == 2


def test_before_its_first_checkpoint_a_run_restarts_from_the_recorded_one_or_not_at_all(
    tmp_path: Path, parent: Path, run_tiny: RunTiny, train: Callable[..., Outcome]
) -> None:
    other = shutil.copytree(parent, tmp_path / "other")
    shutil.rmtree(checkpoint_path(other / "checkpoints", 20))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", other, "train.steps=5", observers=(StopAfter(2), StopAfter(2)))
    shutil.copytree(checkpoint_path(parent / "checkpoints", 20), checkpoint_path(other / "checkpoints", 20))
    train(tmp_path / "run", other, "train.steps=5")  # meanwhile the other run has a newer one
    assert read_config(tmp_path / "run" / "config.yaml").run.init_from == f"{other}@10"
    train(tmp_path / "whole", f"{parent}@10", "train.steps=5")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")

    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(other)
    run_tiny(other, "train.steps=10", "optim.lr=0.02")
    made = read_manifest(checkpoint_path(other / "checkpoints", 10)).generation
    reported = refusal(lambda: find_init_checkpoint(read_config(tmp_path / "run" / "config.yaml")))
    assert reported.startswith(
        f"run.init_from={other}@10 is another checkpoint now (generation {made}) than the one that this run "
        f"started from ("
    )


def test_the_folder_of_a_checkpoint_may_be_named(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(checkpoint_path(parent / "checkpoints", 10), tmp_path / "kept" / "step-00000010")
    train(tmp_path / "run", copy, "train.steps=2")
    assert validations(tmp_path / "run")[0] == validations(parent)[10]
    config = read_config(tmp_path / "run" / "config.yaml")
    assert (config.run.init_from, config.run.ancestry[0].run) == (str(copy), str(copy))  # it lies in no run directory
    shutil.copy(parent / "config.yaml", tmp_path)  # nor does it here: it is not in a folder `checkpoints`
    assert find_init_checkpoint(config).run_dir is None
    monkeypatch.chdir(parent / "checkpoints")
    run = config.run.model_copy(update={"init_from": "step-00000010"})
    assert find_init_checkpoint(config.model_copy(update={"run": run})).run_dir == parent


@pytest.fixture(scope="module")
def other_data(tiny_text: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other documents, the same tokenizer."""
    path = tmp_path_factory.mktemp("other") / "data"
    sources = (SourceConfig(name="a", kind="text", paths=(f"{tiny_text}/0*",)),)
    prepare(
        path, PrepareConfig(sources=sources, tokenizer=tiny_data / "tokenizer.json", validation_fraction=0.1, workers=1)
    )
    return path


@pytest.fixture(scope="module")
def other_tokenizer(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tokens, others."""
    path = tmp_path_factory.mktemp("foreign") / "data"
    sources = (SourceConfig(name="a", kind="text", paths=(f"{tiny_text}/00*",)),)
    prepare(
        path, PrepareConfig(sources=sources, vocab_size=290, tokenizer_sample_mb=1, validation_fraction=0.1, workers=1)
    )
    return path


def test_weights_continue_on_other_data_of_the_same_tokenizer(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome], other_data: Path
) -> None:
    train(tmp_path, parent, f"data.path={other_data}", "train.steps=5", "data.seq_len=64")
    assert len(curve(tmp_path)) == 5
    assert (
        read_manifest(checkpoint_path(tmp_path / "checkpoints", 5)).dataset
        != read_manifest(checkpoint_path(parent / "checkpoints", 20)).dataset
    )


@pytest.mark.parametrize(
    ("step", "args", "reported"),
    [
        (
            20,
            ["model.d_ff=128", "model.n_layers=3"],
            "has weights of another model: model.n_layers is 2 there and 3 here; model.d_ff is 64 there and 128 here; "
            "leave these settings out, the model is then that run's",
        ),
        (
            20,
            ["model.n_heads=4", "model.head_dim=8"],
            "of another model: model.n_heads is 2 there and 4 here; model.head_dim is 16 there and 8 here; leave these",
        ),
        (
            20,
            ["run.init_mode=full", "train.steps=20"],
            "with run.init_mode=full goes on at step 21, and train.steps=20 counts from the first step of that run: "
            "set train.steps to more than 20, or run.init_mode=weights to begin at step 1",
        ),
        (
            20,
            ["run.init_mode=full", "optim.kind=muon"],
            "takes over the state of its optimizer, adamw, and optim.kind=muon: set optim.kind=adamw, or run.init_mode",
        ),
        (
            20,
            ["run.init_mode=full", "run.seed=5", "data.seq_len=64"],
            "but its first 80 sequences would have come in another order: run.seed is 1234 there and 5 here; "
            "data.seq_len is 32 there and 64 here; put that back, or set run.init_mode=weights",
        ),
        (15, [], "there is no checkpoint of step 15; kept are 10, 20 (checkpoint.keep says how many a run keeps)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path,
    parent: Path,
    child: Callable[..., list[str]],
    pretrain: Pretrain,
    step: int,
    args: list[str],
    reported: str,
) -> None:
    answer = pretrain("train", *child(tmp_path / "run", f"{parent}@{step}", *args))
    assert answer.code == 2
    assert answer.err.startswith(f"error: run.init_from={parent}@{step}")
    assert reported in answer.err
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_full_wants_the_same_data_and_weights_the_same_tokenizer(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome], other_data: Path, other_tokenizer: Path
) -> None:
    reported = refusal(lambda: train(tmp_path / "run", parent, "run.init_mode=full", f"data.path={other_data}"))
    assert f"reads on where that run stopped, but data.path={other_data}" in reported
    assert "or run.init_mode=weights to begin with other data" in reported
    reported = refusal(lambda: train(tmp_path / "run", parent, f"data.path={other_tokenizer}"))
    assert f"run.init_from={parent}@20 was trained with another tokenizer (" in reported
    assert f"prepare the data with data.tokenizer={parent / 'tokenizer.json'}" in reported
    alone = shutil.copytree(checkpoint_path(parent / "checkpoints", 20), tmp_path / "kept" / "step")
    shutil.copy(other_tokenizer / "tokenizer.json", tmp_path)  # beside it lies one that is not its own
    reported = refusal(lambda: train(tmp_path / "run", alone, f"data.path={other_tokenizer}"))
    assert f"run.init_from={alone} was trained with another tokenizer (" in reported
    assert not (tmp_path / "run").exists()


def test_init_from_errors_say_what_is_missing(tmp_path: Path, parent: Path, train: Callable[..., Outcome]) -> None:
    assert (
        "is neither a run directory with a config.yaml nor the folder of a checkpoint; write RUN or RUN@STEP"
        in refusal(lambda: train(tmp_path / "run", tmp_path / "nothing"))
    )
    assert "neither a run directory" in refusal(lambda: train(tmp_path / "run", f"{parent}@best"))
    assert "is run.dir itself, which resumes without it" in refusal(lambda: train(parent, parent))
    (tmp_path / "young").mkdir()
    shutil.copy(parent / "config.yaml", tmp_path / "young")
    assert f"{tmp_path / 'young'} holds no checkpoint; name a run directory that does" in refusal(
        lambda: train(tmp_path / "run", tmp_path / "young")
    )


def test_a_damaged_checkpoint_is_refused_and_another_one_is_named(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    damaged = shutil.copytree(parent, tmp_path / "damaged")
    file = checkpoint_path(damaged / "checkpoints", 20) / "__0_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    reported = refusal(lambda: train(tmp_path / "run", damaged, "train.steps=2"))
    assert reported.startswith(f"run.init_from={damaged}@20: {file} is damaged: its checksum is ")
    assert reported.endswith("; name another step (10)")
    assert not (tmp_path / "run" / "config.yaml").exists()
    train(tmp_path / "run", f"{damaged}@10", "train.steps=2")
    assert validations(tmp_path / "run")[0] == validations(parent)[10]


def test_a_checkpoint_deleted_while_it_is_read_is_reported(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = shutil.copytree(parent, tmp_path / "moving")

    def verify(path: Path, *_: int) -> list[str]:
        shutil.rmtree(path)
        return []

    monkeypatch.setattr("pretrain.checkpoint.verify.verify_checkpoint", verify)
    reported = refusal(lambda: train(tmp_path / "run", moving, "train.steps=2"))
    assert (
        f"{checkpoint_path(moving / 'checkpoints', 20)} was deleted while it was read; its run keeps "
        f"checkpoint.keep=3 only" in reported
    )


def test_model_settings_without_weights_may_differ_and_are_reported(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    """Longer contexts: another base of RoPE, a longer limit."""
    train(tmp_path, parent, "train.steps=2", "model.rope.theta=500000", "model.max_seq_len=128", "data.seq_len=128")
    start = next(e.text for e in read_events(tmp_path / "events.jsonl") if e.kind == "start")
    assert start.endswith("; model.max_seq_len=128, there 64; model.rope.theta=500000.0, there 10000.0")


def test_the_model_comes_from_the_other_run_and_its_origin_is_shown(
    tmp_path: Path, parent: Path, child: Callable[..., list[str]]
) -> None:
    loaded = load(None, child(tmp_path / "run", parent, "model.vocab_size=auto", "model.init_std=0.01"))
    assert (loaded.config.model.d_model, loaded.config.model.vocab_size, loaded.config.model.init_std) == (
        32,
        320,
        0.01,
    )
    assert (loaded.origin["model.d_model"], loaded.origin["model.init_std"]) == ("run.init_from", "command line")
    args = [
        arg
        for arg in child(tmp_path / "run", parent, "run.init_from=null")
        if not arg.startswith(f"run.init_from={parent}")
    ]
    assert load(None, args).config.model.d_model == 768  # negative control


def test_the_same_settings_reproduce_a_run_that_began_from_another(
    tmp_path: Path, parent: Path, train: Callable[..., Outcome]
) -> None:
    train(tmp_path / "run", parent, "train.steps=3")
    config = load(tmp_path / "run" / "config.yaml", [f"run.dir={tmp_path / 'again'}"]).config
    assert train_run(config, Console(file=io.StringIO())) is Outcome.FINISHED
    assert curve(tmp_path / "again") == curve(tmp_path / "run")
    ours, theirs = (read_config(tmp_path / name / "config.yaml").run.ancestry for name in ("again", "run"))
    assert ours == theirs
