"""Lost output does not end training: a reader that exits, a full disk, a closed terminal, failing loggers or report."""

import errno
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from workers import PROCESSES

from pretrain.cli import main
from pretrain.errors import Diverged
from pretrain.runs.jsonl import read_events, read_metrics
from pretrain.runs.schema import StepRecord, ValidationRecord
from pretrain.streams import OutputLost, TolerantStream, tolerant_streams
from pretrain.train import loop
from pretrain.train.loop import Outcome

RunTiny = Callable[..., Outcome]
Pretrain = Callable[..., object]
TinyArgs = Callable[..., list[str]]


class Fails(io.StringIO):
    """A file that takes so many writes and then raises."""

    def __init__(self, error: Exception, writes: int = 0) -> None:
        super().__init__()
        self.error, self.left = error, writes

    def write(self, text: str) -> int:
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.train.run.write_report", lambda path: path / "report.html")


def event_texts(run_dir: Path, kind: str) -> list[tuple[int | None, str]]:
    return [(event.step, event.text) for event in read_events(run_dir / "events.jsonl") if event.kind == kind]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("I/O operation on closed file"), "I/O operation on closed file"),
    ],
    ids=["pipe", "disk", "closed"],
)
@pytest.mark.parametrize("terminal", [False, True], ids=["lines", "panel"])
def test_a_run_outlives_its_display_and_records_it(
    tmp_path: Path, run_tiny: RunTiny, error: Exception, reason: str, terminal: bool
) -> None:
    console = Console(file=Fails(error, writes=2), force_terminal=terminal)
    assert run_tiny(tmp_path, "train.steps=4", "optim.warmup=1", "eval.every=4", console=console) is Outcome.FINISHED
    [(step, text)] = event_texts(tmp_path, "output_lost")
    assert text == f"the display cannot be written ({reason}): the run continues without it"
    assert step == 0
    assert event_texts(tmp_path, "finish")
    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl").steps] == [1, 2, 3, 4]
    assert (tmp_path / "checkpoints" / "step-00000004").is_dir()


def test_a_working_display_is_not_recorded_as_lost(tmp_path: Path, run_tiny: RunTiny) -> None:
    assert (
        run_tiny(tmp_path, "train.steps=2", "optim.warmup=1", console=Console(file=Fails(OSError(), writes=-1)))
        is Outcome.FINISHED
    )
    assert event_texts(tmp_path, "output_lost") == []


class Raises:
    """A logger that raises when it hears of a step, and when it is closed."""

    def __init__(self, step: int | None, *, at_close: bool = False) -> None:
        self.step, self.at_close, self.received = step, at_close, list[int]()

    def log(self, record: StepRecord | ValidationRecord) -> None:
        self.received.append(record.step)
        if record.step == self.step:
            raise RuntimeError("its service\nis down")

    def close(self) -> None:
        if self.at_close:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_continues_without_a_logger_that_raises(tmp_path: Path, run_tiny: RunTiny) -> None:
    bad, worse, good = Raises(3, at_close=True), Raises(None, at_close=True), Raises(None)
    assert run_tiny(tmp_path, "train.steps=5", "eval.every=9", observers=[bad, worse, good]) is Outcome.FINISHED
    assert bad.received == [0, 1, 2, 3]
    assert good.received == [0, 1, 2, 3, 4, 5, 5]
    assert event_texts(tmp_path, "logger_failed") == [
        (3, "Raises: RuntimeError: its service is down; the run continues without it"),
        (None, "Raises: OSError: No space left on device; the run continues without it"),
    ]


def test_a_report_that_fails_is_one_warning_and_keeps_the_outcome(
    tmp_path: Path, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pretrain.train.run.write_report", fail)
    console = Console(file=io.StringIO(), width=400)
    assert run_tiny(tmp_path, "train.steps=2", "optim.warmup=1", console=console) is Outcome.FINISHED
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'report.html'} was not written (No space left on device); nothing else is missing: "
        f"`pretrain report {tmp_path}` tries again\n"
    )
    assert "report:" not in console.file.getvalue()


def test_a_report_that_fails_after_an_error_is_silent(
    tmp_path: Path, run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Path) -> Path:
        raise ValueError("no such chart")

    def diverge(*_: object) -> bool:
        raise Diverged("at step 1")

    monkeypatch.setattr("pretrain.train.run.write_report", fail)
    monkeypatch.setattr("pretrain.train.loop.TrainLoop._train_step", diverge)
    with pytest.raises(Diverged, match="at step 1") as caught:
        run_tiny(tmp_path, "train.steps=2", "optim.warmup=1")
    assert caught.value.__context__ is None
    assert capsys.readouterr().err == ""


def test_text_that_the_encoding_does_not_have_is_shown_as_far_as_it_can_be() -> None:
    raw = io.BytesIO()
    stream = TolerantStream(io.TextIOWrapper(raw, encoding="ascii"), "standard output", needed=True)
    print("naïve ▁▂", file=stream, flush=True)
    assert raw.getvalue() == b"na?ve ??\n"
    assert stream.error is None


@contextmanager
def lost_output(kind: str) -> Iterator[None]:
    """Standard output that cannot be written: `full` is a full disk, `pipe` a pipe without a reader."""
    if kind == "full":
        file = Path("/dev/full").open("w")  # noqa: SIM115  # closed below
    else:
        reader, writer = os.pipe()
        os.close(reader)
        file = os.fdopen(writer, "w")
    with file, redirect_stdout(file):
        yield


@pytest.mark.parametrize("args", ["show", "schema"])
def test_a_command_whose_output_is_its_result_fails_in_one_line_where_it_cannot_be_written(
    pretrain: Pretrain, args: str
) -> None:
    with lost_output("full"):
        answer = pretrain("config", args)
    assert (answer.code, answer.err) == (1, "error: standard output cannot be written: No space left on device\n")


@pytest.mark.parametrize(
    "args", [["config", "show"], ["config", "schema"], ["train", "--help"], ["data", "inspect"]], ids=" ".join
)
def test_a_command_whose_reader_left_ends_without_a_word(pretrain: Pretrain, args: list[str], tiny_data: Path) -> None:
    with lost_output("pipe"):
        answer = pretrain(*args, *([tiny_data] if args[-1] == "inspect" else []))
    assert (answer.code, answer.out, answer.err) == (0, "", "")


@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_preparation_continues_without_its_output(
    pretrain: Pretrain, tmp_path: Path, tiny_text: Path, kind: str
) -> None:
    source = f"data.sources=[{{kind: text, paths: [{tiny_text}]}}]"
    with lost_output(kind):
        answer = pretrain(
            "data", "prepare", source, f"data.path={tmp_path / 'data'}", "data.vocab_size=300", "data.workers=1"
        )
    assert (answer.code, answer.out) == (0, "")
    assert (tmp_path / "data" / "train" / "manifest.json").is_file()


def test_an_error_keeps_its_exit_code_when_standard_error_is_lost(pretrain: Pretrain) -> None:
    with Path("/dev/full").open("w") as file, redirect_stderr(file):
        assert pretrain("train", "no-such.yaml").code == 2


def test_losing_the_output_raises_only_where_it_is_needed() -> None:
    lost = Fails(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    needed = TolerantStream(lost, "standard output", needed=True)
    for _ in range(2):
        with pytest.raises(OutputLost, match="standard output cannot be written: Broken pipe"):
            needed.write("a")
    assert not needed.isatty()
    needed.needed = False
    assert needed.write("abc") == 3
    TolerantStream(lost, "standard output", needed=False).write("a")


def test_closed_streams_do_not_give_their_numbers_to_the_next_files() -> None:
    code = (
        "import os; from pretrain.streams import tolerant_streams\n"
        "with tolerant_streams(): print('x', open('/dev/zero').fileno()); "
        "os._exit(7 if os.readlink('/proc/self/fd/1') == '/dev/null' else 1)"
    )
    shell = f'exec {sys.executable} -c "{code}" >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell], check=False).returncode == 7
    with tolerant_streams():
        assert isinstance(sys.stdout, TolerantStream)
    assert not isinstance(sys.stdout, TolerantStream)


def test_a_run_whose_pipes_both_lose_their_reader_ends_well(tmp_path: Path, tiny_args: TinyArgs) -> None:
    """Python's own flush at the end must not fail either: it would make the exit code 120."""
    command = [sys.executable, "-m", "pretrain", "train", *tiny_args(tmp_path, "train.steps=3", "optim.warmup=1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stderr.close()
        assert process.stdout.readline().startswith(b"data.tokenizer = ")
        process.stdout.close()
        assert process.wait(120) == 0
    assert event_texts(tmp_path, "output_lost") == [
        (0, "the display cannot be written (Broken pipe): the run continues without it")
    ]
    assert event_texts(tmp_path, "finish")
    assert (tmp_path / "report.html").is_file()


class Terminal:
    """A process on a pseudo-terminal of 80 columns that calls `main` of the command line, or `function` before it."""

    def __init__(self, args: list[str], function: Callable[[], None] | None = None) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self.process = PROCESSES.Process(target=on_terminal, args=(os.ttyname(slave), args, function))
        self.process.start()
        self.seen = ""
        self._slave = slave

    def read_until(self, text: str) -> None:
        """Read what is shown up to `text`."""
        end = time.monotonic() + 120
        while text not in self.seen:
            assert select.select([self.master], [], [], end - time.monotonic())[0], self.seen
            self.seen += os.read(self.master, 4096).decode()
        _, _, self.seen = self.seen.partition(text)

    def press(self, key: str) -> None:
        os.write(self.master, key.encode())

    def close(self) -> None:
        for number in (self._slave, self.master):
            os.close(number)

    def exit_code(self) -> int | None:
        self.process.join(120)
        code = self.process.exitcode
        self.process.kill()  # where it did not end
        return code


def on_terminal(name: str, args: list[str], function: Callable[[], None] | None) -> None:
    os.setsid()
    number = os.open(name, os.O_RDWR)  # the first terminal that a session opens becomes its own
    for standard in (0, 1, 2):
        os.dup2(number, standard)
    os.close(number)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup, which is inherited
    os.environ |= {"TERM": "xterm"}
    sys.stdout, sys.stderr, sys.argv = os.fdopen(1, "w"), os.fdopen(2, "w"), ["pretrain", *args]
    torch.set_num_threads(1)
    if function:
        function()
    main()


@dataclass(frozen=True)
class HoldSaves:
    """A save waits until there is a file `go`."""

    go: Path

    def __call__(self) -> None:
        save = loop.save_checkpoint

        def held(*given: object) -> Path:
            while not self.go.exists():
                time.sleep(0.01)
            return save(*given)

        loop.save_checkpoint = held


CTRL_C = "\x03"


def test_on_a_terminal_ctrl_c_is_answered_in_the_panel_and_a_second_one_lets_the_save_finish(
    tmp_path: Path, tiny_args: TinyArgs
) -> None:
    args = tiny_args(
        tmp_path / "run", "train.steps=100000", "eval.every=100000", "checkpoint.every=50000", "optim.decay=0.5"
    )
    terminal = Terminal(["train", *args], HoldSaves(tmp_path / "go"))
    terminal.read_until("training loss")
    terminal.press(CTRL_C)
    terminal.read_until("saving, then stopping (Ctrl-C twice more leaves without it)")
    terminal.read_until("waiting for the save")
    terminal.press(CTRL_C)
    terminal.read_until("saving, then leaving (Ctrl-C again leaves without it)")
    (tmp_path / "go").touch()
    terminal.read_until("SIGINT received; the same command resumes from here")
    terminal.read_until("report.html")
    assert terminal.exit_code() == 75
    terminal.close()
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert event_texts(tmp_path / "run", "stop") == [
        (int(saved.name[-8:]), "SIGINT received; the same command resumes from here")
    ]


def test_a_terminal_that_closes_saves_the_run(tmp_path: Path, tiny_args: TinyArgs) -> None:
    args = tiny_args(tmp_path, "train.steps=100000", "eval.every=100000", "checkpoint.every=50000", "optim.decay=0.5")
    terminal = Terminal(["train", *args])
    terminal.read_until("training loss")
    terminal.close()
    assert terminal.exit_code() == 75
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert event_texts(tmp_path, "stop") == [
        (int(saved.name[-8:]), "SIGHUP received; the same command resumes from here")
    ]
