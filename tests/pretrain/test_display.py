"""What a person sees while a run trains."""

import io
import math
import re
import signal

import pytest
from rich.console import Console
from step_records import step_record

from pretrain.console import format_count, format_decimal, format_duration
from pretrain.runs.schema import Event, RoutingStatistics, SourceLoss, StepRecord, ValidationRecord
from pretrain.runs.throughput import AverageThroughput
from pretrain.signals import Activity, StopRequest, stop_on_signals
from pretrain.tracking.display import Display, Sparkline


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=60), out


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_file_gets_one_line_every_ten_seconds_and_the_last_step() -> None:
    console, out = plain_console()
    clock = FakeClock()
    with Display(100, console=console, clock=clock) as display:
        for step in range(1, 101):
            clock.now += 0.5
            display.step(step_record(step))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [
        "1/100",
        "21/100",
        "41/100",
        "61/100",
        "81/100",
        "100/100",
    ]


def test_a_line_of_a_log_is_not_wrapped_and_carries_no_control_codes() -> None:
    console, out = plain_console()
    with Display(400, console=console) as display:
        display.step(step_record(150, mfu=0.412), AverageThroughput(tokens_per_s=11204.4, mfu=0.398, seconds_left=192))
    assert (
        out.getvalue()
        == "step 150/400  loss 3.2500  lr 3.00e-04  grad norm 0.80  11,204 tokens/s  MFU 39.8%  3 min 12 s left\n"
    )


def test_without_a_known_peak_no_mfu_is_shown() -> None:
    console, out = plain_console()
    with Display(400, console=console) as display:
        display.step(step_record(1), AverageThroughput(tokens_per_s=10.0, mfu=None, seconds_left=5))
    assert "MFU" not in out.getvalue()


def test_the_mfu_statement_is_said_once() -> None:
    console, out = plain_console()
    with Display(3, console=console, mfu_statement="MFU counts so") as display:
        for step in (1, 2, 3):
            display.step(step_record(step))
    assert out.getvalue().count("MFU counts so") == 1


def test_validations_and_events_are_always_printed() -> None:
    console, out = plain_console()
    with Display(100, console=console) as display:
        display.validation(ValidationRecord(step=50, val_loss=2.0, val_tokens=9, time=0))
        display.event(Event(time=0, step=50, kind="save", text="step-00000050"))
        display.event(Event(time=0, step=50, kind="sample", prompt="def f(", text="x): return [red]x[/red]"))
    assert out.getvalue().splitlines() == [
        "validation after step 50: loss 2.000, perplexity 7.39",
        "save at step 50: step-00000050",
        "sample at step 50: def f(x): return [red]x[/red]",
    ]


def by_source(count: int) -> ValidationRecord:
    losses = {f"source-{i}": SourceLoss(loss=i / 2, tokens=9) for i in range(count)}
    return ValidationRecord(step=50, val_loss=2.0, val_tokens=9 * count, by_source=losses, time=0)


def test_of_several_sources_each_has_its_loss_and_perplexity() -> None:
    console, out = plain_console()
    with Display(100, console=console) as display:
        for count in (1, 2, 11):
            display.validation(by_source(count))
    one, two, head, eleven = [out.getvalue().splitlines()[i] for i in (0, 2, 3, 4)]
    assert one == head == "validation after step 50: loss 2.000, perplexity 7.39"
    assert two == "  by source: source-0 0.000 (perplexity 1.00), source-1 0.500 (perplexity 1.65)"
    assert eleven.endswith("source-7 3.500 (perplexity 33.12), and 3 more in metrics.jsonl")


@pytest.mark.parametrize(
    ("count", "width", "line"), [(2, 80, "source-1 0.500"), (11, 80, "+7"), (11, 300, "source-10 5.000")]
)
def test_the_panel_has_a_line_of_the_sources_that_fits(count: int, width: int, line: str) -> None:
    out = io.StringIO()
    with Display(400, console=Console(file=out, force_terminal=True, width=width, legacy_windows=False)) as display:
        display.step(step_record(1))
        display.validation(by_source(count))
    lines = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", line).strip("\r ") for line in out.getvalue().splitlines()]
    message = [line for line in lines if line.startswith("by source  source-0 0.000")][-1]
    assert message.endswith(line)
    assert len(message) < width


ROUTING = RoutingStatistics(layers=(1, 3), load_max=(1.25, 2.5), dead=(0, 2), entropy=(0.9, 0.7))


def test_the_experts_have_a_line_of_their_own() -> None:
    console, out = plain_console()
    with Display(9, console=console, every_s=0) as display:
        display.step(step_record(1, routing=ROUTING))
        record = step_record(2, routing=ROUTING.model_copy(update={"dropped": (0.01, 0.02)}))
        display.step(record.model_copy(update={"aux_loss": 0.0213, "router_z_loss": 0.004}))
        display.step(step_record(3))
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[1] == "  experts: load max/mean 2.50 in layer 3, 2 dead"
    assert lines[3] == f"{lines[1]}, 1.50% dropped, aux loss 0.0213, router z-loss 0.0040"


@pytest.mark.parametrize(("width", "line"), [(80, "2 dead"), (40, "…")])
def test_the_panel_has_a_line_of_the_experts_that_fits(width: int, line: str) -> None:
    out = io.StringIO()
    with Display(400, console=Console(file=out, force_terminal=True, width=width, legacy_windows=False)) as display:
        display.step(step_record(1, routing=ROUTING))
    lines = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", line).strip("\r ") for line in out.getvalue().splitlines()]
    message = [line for line in lines if line.startswith("experts: load max/mean 2.50")][-1]
    assert message.endswith(line)
    assert len(message) <= width


def test_a_terminal_shows_a_panel_that_continues_at_the_resumed_step() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False)
    with Display(400, console=console) as display:
        display.validation(ValidationRecord(step=200, val_loss=2.5, val_tokens=9, time=0))
        display.step(step_record(201), AverageThroughput(tokens_per_s=2000.0, mfu=0.41, seconds_left=99))
    text = out.getvalue()
    for word in ("step 201 of 400", "3.250", "2.500", "3.00e-04", "2,000", "41.0%", "1 min 39 s left"):
        assert word in text


def test_a_loss_that_is_not_finite_says_so() -> None:
    console, out = plain_console()
    with Display(9, console=console) as display:
        display.step(step_record(1, loss=math.nan))
    assert "loss not finite" in out.getvalue()


def test_the_sparkline_falls_with_the_loss_and_fits_its_width() -> None:
    line = Sparkline(capacity=16)
    for i in range(1000):
        line.add(1000.0 - i)
    line.add(math.nan)
    drawn = line.draw(8)
    assert drawn == "█▇▆▅▄▃▂▁"
    assert Sparkline().draw(8) == ""


def test_a_flat_curve_is_flat() -> None:
    line = Sparkline()
    for _ in range(5):
        line.add(2.0)
    assert line.draw(60) == "▄" * 5


def test_words_for_numbers() -> None:
    assert [format_duration(s) for s in (0.4, 59.6, 192, 7500, 370_000)] == [
        "0 s",
        "1 min 00 s",
        "3 min 12 s",
        "2 h 05 min",
        "4 d 06 h",
    ]
    assert [format_count(n) for n in (950, 8192, 12_588_032, 999_600_000, 1.4e12)] == [
        "950",
        "8.19k",
        "12.6M",
        "1.00B",
        "1.40T",
    ]
    assert (format_decimal(2.4706), format_decimal(math.inf)) == ("2.471", "not finite")


def panel(stop: StopRequest, *records: StepRecord) -> list[str]:
    """The lines of the panel that say what the run is doing, on a terminal of 80 columns."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None, legacy_windows=False)
    display = Display(400, console=console, stop=stop, clock=lambda: stop.since + 65)
    for each in records:
        display.step(each)
    with console.capture() as capture:
        console.print(display._panel())
    return [
        line
        for line in capture.get().splitlines()
        if any(word in line for word in ("is running", "stopping", "leaving", "waiting"))
    ]


STOPPING = "stopping after this step, then saving (Ctrl-C again leaves without saving)"


@pytest.mark.parametrize(
    ("activity", "presses", "records", "lines"),
    [
        (Activity.STEP, 0, 0, ["the first step is running (1 min 05 s)"]),
        (Activity.STEP, 0, 1, []),
        (Activity.VALIDATION, 0, 0, ["the validation is running (1 min 05 s)"]),
        (Activity.SAVE, 0, 1, ["the save is running (1 min 05 s)"]),
        (Activity.STEP, 1, 0, [STOPPING, "waiting for the first step (1 min 05 s)"]),
        (Activity.STEP, 1, 1, [STOPPING, "waiting for the step (1 min 05 s)"]),
        (Activity.VALIDATION, 1, 0, [STOPPING, "waiting for the validation (1 min 05 s)"]),
        (
            Activity.SAVE,
            1,
            1,
            ["saving, then stopping (Ctrl-C twice more leaves without it)", "waiting for the save (1 min 05 s)"],
        ),
        (
            Activity.SAVE,
            2,
            1,
            ["saving, then leaving (Ctrl-C again leaves without it)", "waiting for the save (1 min 05 s)"],
        ),
    ],
)
def test_the_panel_says_what_a_stop_waits_for(activity: Activity, presses: int, records: int, lines: list[str]) -> None:
    with stop_on_signals(verbose=False) as stop, stop.during(activity):
        for _ in range(presses):
            signal.raise_signal(signal.SIGINT)
        assert [line.rstrip() for line in panel(stop, *map(step_record, range(records)))] == lines


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("activity", "numbers", "leaves"),
    [
        (Activity.STEP, [INT], False),
        (Activity.STEP, [INT, INT], True),
        (Activity.STEP, [TERM, INT], True),
        (Activity.STEP, [TERM, TERM, HUP, TERM], False),
        (Activity.VALIDATION, [INT, INT], True),
        (Activity.SAVE, [INT, INT], False),
        (Activity.SAVE, [TERM, TERM, HUP, INT], False),
        (Activity.SAVE, [INT, INT, INT], True),
    ],
)
def test_only_ctrl_c_leaves_without_saving_and_in_a_save_only_the_third(
    activity: Activity, numbers: list[signal.Signals], leaves: bool
) -> None:
    with stop_on_signals(verbose=False) as stop, stop.during(activity):
        for number in numbers[:-1]:
            signal.raise_signal(number)
        if leaves:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(numbers[-1])
        else:
            signal.raise_signal(numbers[-1])
            assert stop.name == numbers[-1].name


def test_a_hangup_that_is_ignored_stays_ignored_as_under_nohup() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with stop_on_signals(verbose=False) as stop:
            signal.raise_signal(HUP)
            assert not stop
    finally:
        signal.signal(HUP, before)


def test_the_notice_goes_to_standard_error_unless_a_panel_shows_it(capfd: pytest.CaptureFixture[str]) -> None:
    for terminal, said in ((False, f"\n{STOPPING}\n"), (True, "")):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        with stop_on_signals() as stop, Display(400, console=console, stop=stop):
            signal.raise_signal(INT)
        assert capfd.readouterr().err == said


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with Display(400, console=console) as display:
        display.step(step_record(1))
    assert console.file.getvalue().startswith("step 1/400  loss 3.2500")


def test_the_bar_keeps_to_80_columns() -> None:
    """A terminal that gets narrower breaks longer lines."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None, legacy_windows=False)
    display = Display(400, console=console)
    display.step(step_record(150, mfu=0.412), AverageThroughput(tokens_per_s=11204.4, mfu=0.398, seconds_left=192))
    display.validation(ValidationRecord(step=150, val_loss=2.0, val_tokens=9, time=0))
    with console.capture() as capture:
        console.print(display._panel())
    assert max(map(len, capture.get().splitlines())) == 80
