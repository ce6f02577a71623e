"""A run directory belongs to one configuration and one process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.config import RunConfig
from pretrain.config.saved import read_config
from pretrain.errors import UserError
from pretrain.runs.directory import RunDirectory
from pretrain.runs.jsonl import RecordFile, read_events
from pretrain.runs.schema import Event

HOLD = """
import sys, time
from pretrain.config import RunConfig
from pretrain.runs.directory import RunDirectory
run = RunDirectory.open(RunConfig.model_validate({"run": {"dir": sys.argv[1]}}))
print("open", flush=True)
time.sleep(60)
"""


def opened(wanted: RunConfig) -> RunDirectory:
    """As `train` does it: what `open` accepts is then written."""
    run = RunDirectory.open(wanted)
    run.write_config(wanted)
    return run


def config(path: Path, **sections: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate({"run": {"dir": str(path)}} | sections)


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def test_a_new_run_writes_every_setting(tmp_path: Path) -> None:
    wanted = config(tmp_path / "a" / "run", model={"n_layers": 3})
    with opened(wanted) as run:
        assert read_config(run.path / "config.yaml") == wanted
        assert run.attempt == 1
        assert yaml.safe_load((run.path / "config.yaml").read_text())["model"]["n_layers"] == 3
        assert set(contents(run.path)) == {"config.yaml"}


def test_the_same_settings_open_it_again_and_count_the_attempts(tmp_path: Path) -> None:
    wanted = config(tmp_path / "run")
    opened(wanted).close()
    with RecordFile(tmp_path / "run" / "events.jsonl") as events:
        events.append(Event(time=0, step=0, kind="start", text=""))
        events.append(Event(time=0, step=5, kind="save", text=""))
    before = contents(tmp_path / "run")
    with opened(wanted) as run:
        assert run.attempt == 2
    assert contents(tmp_path / "run") == before


def test_other_settings_are_refused_with_the_difference_in_one_line(tmp_path: Path) -> None:
    opened(config(tmp_path / "run", model={"n_layers": 6})).close()
    before = contents(tmp_path / "run")
    with pytest.raises(UserError) as refusal:
        opened(config(tmp_path / "run", model={"n_layers": 8}, checkpoint={"keep": 9}))
    message = str(refusal.value)
    assert "model.n_layers: 6 in the run, 8 now" in message
    assert "checkpoint.keep" not in message
    assert "choose another run.dir" in message
    assert "\n" not in message
    assert contents(tmp_path / "run") == before
    opened(config(tmp_path / "run", model={"n_layers": 6})).close()  # the refusal let go of the lock


def test_many_differences_are_cut_to_five(tmp_path: Path) -> None:
    opened(config(tmp_path / "run")).close()
    other = config(
        tmp_path / "run",
        optim={
            "kind": "muon",
            "eps": 1,
            "weight_decay": 1,
            "muon_momentum": 0.5,
            "betas": (0.5, 0.5),
            "max_grad_norm": 2,
        },
        train={"z_loss": 1},
    )
    with pytest.raises(UserError, match="and 2 more; put the values back") as refusal:
        opened(other)
    assert str(refusal.value).count(" in the run, ") == 5
    assert str(refusal.value).endswith(
        f"choose another run.dir (to start from the weights of this one: run.init_from={tmp_path / 'run'})"
    )


def test_the_schedule_is_left_to_who_knows_the_steps_taken(tmp_path: Path) -> None:
    """`pretrain.train.resume`, which compares it before `write_config` writes anything."""
    opened(config(tmp_path / "run")).close()
    with RunDirectory.open(config(tmp_path / "run", train={"steps": 2000})) as run:
        assert run.changes == ("train.steps: 1000 in the run, 2000 now",)


def test_a_setting_that_changes_no_number_is_accepted_and_noted(tmp_path: Path) -> None:
    opened(config(tmp_path / "run")).close()
    with opened(config(tmp_path / "run", checkpoint={"keep": 7})) as run:
        assert read_config(run.path / "config.yaml").checkpoint.keep == 7
        events = read_events(run.events)
    assert [(event.kind, event.text) for event in events] == [("settings", "checkpoint.keep: 3 in the run, 7 now")]


def test_a_moved_run_is_the_same_run(tmp_path: Path) -> None:
    opened(config(tmp_path / "here")).close()
    (tmp_path / "here").rename(tmp_path / "there")
    opened(config(tmp_path / "there")).close()


def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            with pytest.raises(UserError, match=rf"is in use by process {holder.pid};"):
                opened(config(tmp_path / "run"))
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    opened(config(tmp_path / "run")).close()


def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"run\.dir=.*file.*choose a directory that can be written"):
        opened(config(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_records_without_settings_are_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.yaml"):
        opened(config(tmp_path))
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("text", ["model: {n_layers: six}", "model: [", "nonsense: {a: 1}", ""])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml (cannot be read|is not YAML)"):
        opened(config(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == text


def test_a_full_disk_leaves_no_half_written_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        opened(config(tmp_path / "run"))
    assert contents(tmp_path / "run") == {}
