"""The report of a run: its text, its curves, and what a browser draws."""

import html
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.report.curves import MAX_POINTS, smooth, thin
from pretrain.report.run_page import write_report
from pretrain.runs.directory import RunDirectory
from pretrain.runs.jsonl import RecordFile
from pretrain.runs.schema import Event, RoutingStatistics, SourceLoss, StepRecord, ValidationRecord

HOSTILE = 'x = "</script><script>console.error(1)</script>" & <b>'


def source_losses(step: int, sources: tuple[str, ...]) -> dict[str, SourceLoss]:
    """Losses that fall from 9 at different speeds, over 5,000 tokens of the first source, 2,500 of the next, ..."""
    return {name: SourceLoss(loss=2 + 7 / (1 + step * (i + 1)), tokens=5000 >> i) for i, name in enumerate(sources)}


def with_counts(losses: dict[str, SourceLoss], n_layers: int) -> dict[str, SourceLoss]:
    """The same with counts of 4 experts: source i uses expert i alone in the last layer, and all alike in others."""
    return {
        name: loss.model_copy(
            update={
                "expert_counts": dict.fromkeys(range(n_layers - 1), (25,) * 4)
                | {n_layers - 1: tuple(100 * (expert == i) for expert in range(4))}
            }
        )
        for i, (name, loss) in enumerate(losses.items())
    }


def routing(n_layers: int, dead: int) -> dict[str, object]:
    """Fields of a step record: layer i's fullest expert has 1 + i / 10 of the mean; the last layer has dead experts."""
    even = (1.0,) * n_layers
    load = tuple(1 + layer / 10 for layer in range(n_layers))
    statistics = RoutingStatistics(
        layers=tuple(range(n_layers)), load_max=load, dead=(0,) * (n_layers - 1) + (dead,), entropy=even, aux_loss=even
    )
    return {"aux_loss": 0.01 * n_layers, "routing": statistics}


def write_run(
    path: Path,
    steps: int,
    *,
    finished: bool = True,
    nan_at: tuple[int, ...] = (),
    sources: tuple[str, ...] = (),
    moe_layers: int = 0,
    dead: int = 0,
) -> Path:
    """A run of `steps` steps, stopped and resumed half way, validated at the start and after every tenth step.

    With `moe_layers` every layer has 4 experts. In the last layer, `dead` of them get no token.
    """
    model: dict[str, object] = {"n_layers": 3, "vocab_size": 512}
    if moe_layers:
        model |= {"n_layers": moe_layers, "architecture": "moe", "moe": {"n_experts": 4}}
    config = RunConfig.model_validate({"run": {"dir": str(path)}, "model": model, "train": {"steps": steps}})
    of_experts = routing(moe_layers, dead) if moe_layers else {}
    half = steps // 2
    with RunDirectory.open(config) as run, RecordFile(run.metrics) as metrics, RecordFile(run.events) as events:
        run.write_config(config)
        events.append(
            Event(
                time=1000,
                step=0,
                kind="start",
                text="new run",
                parameters=12_588_032,
                device="CPU",
                mfu_statement="No MFU",
            )
        )
        losses = source_losses(0, sources)
        losses = with_counts(losses, moe_layers) if moe_layers else losses
        metrics.append(ValidationRecord(step=0, val_loss=9.125, val_tokens=512, by_source=losses, time=1000))
        for step in range(1, steps + 1):
            now = 1000 + step + (600 if step > half else 0)
            loss = math.nan if step in nan_at else 2 + 7 / step
            metrics.append(
                StepRecord(
                    step=step, samples=step, tokens=512 * step, loss=loss, lr=3e-4, grad_norm=1 / step,
                    tokens_per_s=512.0, step_s=1.0, time=now, attempt=1 + (step > half),
                ).model_copy(update=of_experts)
            )  # fmt: skip
            if step % 10 == 0:
                losses = source_losses(step, sources)
                losses = with_counts(losses, moe_layers) if moe_layers else losses
                metrics.append(
                    ValidationRecord(step=step, val_loss=2.25 + 7 / step, val_tokens=512, by_source=losses, time=now)
                )
            if step == half and step > 0:
                events.append(Event(time=now, step=step, kind="stop", text="SIGTERM received"))
                events.append(
                    Event(time=now + 600, step=step, kind="resume", text=HOSTILE, parameters=12_588_032, device="CPU")
                )
        if finished:
            events.append(Event(time=now, step=steps, kind="sample", prompt="def main(", text=HOSTILE))
            events.append(Event(time=now, step=steps, kind="finish", text="done"))
    return path


def text_of(page: str) -> str:
    """The visible text: without scripts and tags, and with single spaces."""
    visible = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", visible)))


# Its text


def test_the_tiles_show_size_tokens_loss_and_time(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "first-run", 40))
    page = text_of(report.read_text())
    assert report == tmp_path / "first-run" / "report.html"
    for text in (
        "first-run finished",
        "12.6M 3 layers",
        "20.5k 40 of 40 steps",
        "2.425 from 9.125, perplexity 11.30",
        "512 tokens/s",
    ):
        assert text in page
    assert "40 s resumed once" in page  # the ten minutes between stop and resume do not count


def test_every_event_and_setting_is_shown(tmp_path: Path) -> None:
    page = text_of(write_report(write_run(tmp_path / "run", 40)).read_text())
    for text in (
        "0 start new run",
        "20 stop SIGTERM received",
        f"20 resume {HOSTILE}",
        "40 finish done",
        "n_layers 3",
        "theta 10000.0",
    ):
        assert text in page
    assert f"def main( {HOSTILE}" in page


def test_the_file_needs_no_network_and_stays_small(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", 400))
    markup = re.sub(r"<script.*?</script>", "", report.read_text(), flags=re.DOTALL)
    assert re.findall(r"""(?:src|href)=|@import|url\(""", markup) == []
    assert report.stat().st_size < 2.5e6


def test_generated_text_is_escaped(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run", 40)).read_text()
    assert "</script><script>console.error" not in page
    assert page.count("<script") == 3


@pytest.mark.parametrize(
    ("steps", "finished", "state"), [(0, False, "not finished"), (1, False, "not finished"), (40, True, "finished")]
)
def test_a_run_at_any_point_has_a_report(tmp_path: Path, steps: int, finished: bool, state: str) -> None:
    config = (
        write_run(tmp_path / "run", 1, finished=False)
        if steps == 0
        else write_run(tmp_path / "run", steps, finished=finished)
    )
    if steps == 0:
        (config / "metrics.jsonl").unlink()
    page = text_of(write_report(tmp_path / "run").read_text())
    assert f"run {state}" in page
    assert ("No step has been recorded yet" in page) == (steps == 0)


def test_losses_that_are_not_finite_get_a_notice(tmp_path: Path) -> None:
    broken = text_of(write_report(write_run(tmp_path / "broken", 40, nan_at=(7, 8))).read_text())
    finite = text_of(write_report(write_run(tmp_path / "finite", 40)).read_text())
    assert "The loss of 2 steps was not finite, first at step 7" in broken
    assert "not finite" not in finite


def test_the_validation_by_source_is_shown_for_several_sources_only(tmp_path: Path) -> None:
    page = text_of(write_report(write_run(tmp_path / "two", 40, sources=("web", "code"))).read_text())
    rows = "web 5,000 9.000 2.171 8.76 code 2,500 9.000 2.086 8.06 all 512"
    assert f"Source Tokens predicted First loss Last loss Perplexity {rows}" in page
    few = (
        "The validation loss is over little text of web (5,000 tokens), code (2,500 tokens): hold out more of it, "
        "or raise eval.batches."
    )
    assert few in page
    one = text_of(write_report(write_run(tmp_path / "one", 40, sources=("web",))).read_text())
    assert "Validation loss by source" not in one
    assert "little text" not in text_of(write_report(write_run(tmp_path / "none", 40)).read_text())


def test_the_experts_have_a_section_with_their_losses_and_what_each_source_uses(tmp_path: Path) -> None:
    page = text_of(write_report(write_run(tmp_path / "run", 40, sources=("web", "code"), moe_layers=2)).read_text())
    assert "4 experts, 2 per token" in page
    assert "Added to the training loss in the last step, all layers together: auxiliary loss 0.0200." in page
    headings = "Source First KL Last KL Highest in layer Most used expert"
    web, code = (
        f"{name} 0.693 0.693 1 (1.386) {i} in layer 1 (100% of its choices)" for i, name in enumerate(("web", "code"))
    )
    assert f"{headings} {web} {code}" in page  # log(4) = 1.386 in the last layer, 0 in the first
    assert "had no token" not in page
    assert "Experts" not in text_of(write_report(write_run(tmp_path / "dense", 40, sources=("a", "b"))).read_text())


def test_dead_experts_get_a_notice(tmp_path: Path) -> None:
    for dead, notice in ((1, "1 expert had no token in the last step: 1 in layer 1."), (3, "3 experts had no token")):
        page = text_of(write_report(write_run(tmp_path / str(dead), 2, moe_layers=2, dead=dead)).read_text())
        assert notice in page


def test_before_a_validation_the_section_says_what_is_missing(tmp_path: Path) -> None:
    missing = "The load of every expert, and which sources use it, appear with the first validation."
    page = text_of(write_report(write_run(tmp_path / "none", 5, moe_layers=2)).read_text())
    assert missing in page
    assert "Load of the fullest expert" in page
    page = text_of(write_report(write_run(tmp_path / "one", 5, moe_layers=2, sources=("web",))).read_text())
    assert "Load of every expert" in page
    assert missing not in page
    assert "Specialisation by source" not in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it holds no config\.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The curves


def test_thinning_keeps_the_ends_and_every_spike() -> None:
    values = np.sin(np.arange(100_000) / 1e4)
    values[[31_415, 77_777]] = 50, -50
    kept = thin(values)
    assert len(kept) <= MAX_POINTS
    assert {0, 31_415, 77_777, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert len(thin(values[:MAX_POINTS])) == MAX_POINTS


def test_thinning_keeps_gaps_visible() -> None:
    values = np.ones(10_000)
    values[5000] = np.nan
    assert 5000 in thin(values)


def test_smoothing_keeps_a_steady_slope_and_skips_gaps() -> None:
    line = np.linspace(9, 3, 61)
    np.testing.assert_allclose(smooth(line, 5)[:-5], line[:-5], rtol=1e-12)
    line[30] = np.nan
    smoothed = smooth(line, 5)
    assert np.isnan(smoothed[30])
    assert np.isfinite(np.delete(smoothed, 30)).all()
    assert smooth(np.array([4.0]), 5).tolist() == [4.0]


@pytest.mark.parametrize(("n", "reach"), [(1, 1), (7, 2), (100, 5), (100, 200), (1000, 37)])
def test_smoothing_equals_the_plain_mean_of_each_window(n: int, reach: int) -> None:
    values = np.random.default_rng(0).normal(3, 1, n)
    windows = [values[max(0, i - min(i, reach)) : i + min(i, reach) + 1] for i in range(n)]
    np.testing.assert_allclose(smooth(values, reach), [window.mean() for window in windows], rtol=1e-12)


def test_a_spike_changes_the_mean_only_near_it() -> None:
    """After one gradient norm of 1e20, a cumulative sum would lose all later values."""
    values = np.full(1000, 3.0)
    values[100] = 1e20
    smoothed = smooth(values, 20)
    assert (smoothed[121:] == 3.0).all()
    assert (smoothed[:50] == 3.0).all()
    assert smoothed[100] > 1e18
    running = np.concatenate([[0.0], np.cumsum(values)])
    assert running[541] - running[500] == 0.0


# What a browser draws


def chromium() -> str:
    """The path of Chromium. Under continuous integration a missing one fails the test, elsewhere it skips it."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium to check the report in; apt-get install chromium")
    return found or pytest.skip("no Chromium on this machine")


def browse(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """Open a page. Returns the document after its scripts have run, and the lines of its console."""
    command = [
        chromium(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,1800",
        f"--user-data-dir={profile}",
    ]
    command += [
        "--virtual-time-budget=20000",
        "--enable-logging=stderr",
        "--v=0",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def charts_in(document: str) -> dict[str, str]:
    """The HTML of each chart by its name."""
    parts = re.split(r'<div class="chart[^"]*" id="chart-(\w+)"', document)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def count_markers(chart: str) -> list[int]:
    """Number of markers of each trace."""
    traces = re.findall(r'<g class="points"[^>]*>(.*?)</g>', chart, flags=re.DOTALL)
    return [trace.count('<path class="point"') for trace in traces if trace]


def count_line_points(chart: str) -> list[int]:
    """Number of points of each line."""
    return [len(re.findall("[MLHV]", path)) for path in re.findall(r'<path class="js-line" d="([^"]*)"', chart)]


def assert_is_drawn(document: str, console: list[str], steps: int, validations: int, marks: int) -> None:
    assert console == []
    charts = charts_in(document)
    assert set(charts) == {"loss", "lr", "grad_norm", "tokens_per_s"}
    assert count_markers(charts["loss"]) == [steps, validations, marks]
    assert count_markers(charts["grad_norm"]) == count_markers(charts["tokens_per_s"]) == [steps]
    assert "9.125" in charts["loss"]
    assert "stop, resume" in charts["loss"]


def test_chromium_draws_every_record_and_reports_no_error(tmp_path: Path) -> None:
    document, console = browse(write_report(write_run(tmp_path / "run", 40)), tmp_path / "profile")
    assert_is_drawn(document, console, steps=40, validations=5, marks=3)
    assert count_line_points(charts_in(document)["lr"]) == [40]
    assert 'data-drawn="light"' in document


def test_chromium_draws_the_dark_page_with_a_gap_at_each_nan(tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", 40, nan_at=(7, 8)))
    document, console = browse(report, tmp_path / "profile", "--blink-settings=preferredColorScheme=0")
    assert console == []
    assert count_markers(charts_in(document)["loss"]) == [38, 5, 3]
    assert 'data-drawn="dark"' in document


def test_chromium_draws_a_curve_for_each_source(tmp_path: Path) -> None:
    names = tuple(f"source-{i}" for i in range(10))
    document, console = browse(write_report(write_run(tmp_path / "run", 40, sources=names)), tmp_path / "profile")
    assert console == []
    charts = charts_in(document)
    assert count_markers(charts["by_source"]) == [5] * 10
    assert re.findall(r'class="legendtext"[^>]*>([^<]+)<', charts["by_source"]) == list(names)


@pytest.mark.parametrize(("n_layers", "curves"), [(5, 5), (20, 3)])  # of many: the highest, the median, the lowest
def test_chromium_draws_curves_and_heat_maps_of_the_experts(tmp_path: Path, n_layers: int, curves: int) -> None:
    report = write_report(write_run(tmp_path / "run", 40, sources=("web", "code"), moe_layers=n_layers))
    document, console = browse(report, tmp_path / "profile", "--blink-settings=preferredColorScheme=0")
    assert console == []
    charts = {name: chart for name, chart in charts_in(document).items() if name.startswith("experts_")}
    over_steps = ["experts_load_max", "experts_entropy", "experts_dead", "experts_aux_loss"]
    assert list(charts) == [*over_steps, "experts_map", "experts_sources", "experts_kl"]
    for name in over_steps:
        in_legend = 1
        assert [n for n in count_line_points(charts[name]) if n > in_legend] == [40] * curves
        assert count_markers(charts[name]) == [40]
    for name, chosen in (("experts_map", "after step 40"), ("experts_sources", f"layer {n_layers - 1}")):
        assert charts[name].count('<g class="hm"><image') == 1
        assert f">{chosen}<" in charts[name]  # where the slider stands
    assert count_markers(charts["experts_kl"]) == [n_layers] * 3  # two sources, and all together


def test_chromium_draws_a_run_of_one_step(tmp_path: Path) -> None:
    document, console = browse(write_report(write_run(tmp_path / "run", 1, finished=False)), tmp_path / "profile")
    assert console == []
    assert [count_markers(charts_in(document)[name]) for name in ("loss", "lr", "grad_norm", "tokens_per_s")] == [
        [1, 1, 1],
        [1],
        [1],
        [1],
    ]


@pytest.mark.parametrize(
    "damage", [('id="figures">{', 'id="figures">'), ('id="plotly">H', 'id="plotly">A'), ('"charts"', '"chart"')]
)
def test_a_damaged_page_fails_the_check(tmp_path: Path, damage: tuple[str, str]) -> None:
    report = write_report(write_run(tmp_path / "run", 40))
    intact = report.read_text()
    assert damage[0] in intact
    report.write_text(intact.replace(*damage))
    document, console = browse(report, tmp_path / "profile")
    assert console != []
    with pytest.raises(AssertionError):
        assert_is_drawn(document, [], steps=40, validations=5, marks=3)
