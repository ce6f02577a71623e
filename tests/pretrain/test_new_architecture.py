"""A new architecture is one file and one preset outside of the repository: those of docs/extend/architecture.md, run
as they stand."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from markdown_it import MarkdownIt
from workers import WorkerPool

from benchmarks.parity.cases import TOLERANCES, Case
from benchmarks.parity.compare import (
    compare,
    make_batch,
    make_config,
    microbatches_of_rank,
    train_case,
    train_reference,
)
from parallel.layout import Layout
from parallel.simulate.memory import ACTIVATIONS
from pretrain.checkpoint.load import load_checkpoint
from pretrain.config.loading import load
from pretrain.errors import UserError
from pretrain.estimate.communication import estimate_traffic
from pretrain.estimate.flops import count_parameters, flops_per_token
from pretrain.estimate.parameters import check_architecture
from pretrain.estimate.rank_memory import estimate_rank_memory
from pretrain.setup.dry_run import measure, shorten_step
from pretrain.setup.engine import build_engine
from pretrain.setup.resolve import resolve_for_cluster

GUIDE = Path(__file__).parents[2] / "docs" / "extend" / "architecture.md"
Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py


@dataclass(frozen=True)
class Guide:
    """The files of the guide, written into a folder that Python imports from."""

    folder: Path

    @property
    def preset(self) -> str:
        return f"model.preset={self.folder / 'parallel-block.yaml'}"


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guide:
    for token in MarkdownIt("commonmark").parse(GUIDE.read_text()):
        title = re.search(r'title="(parallel[^"]+)"', token.info)
        if title:
            (tmp_path / title[1]).write_text(token.content)
    assert {file.name for file in tmp_path.iterdir()} == {"parallel_block.py", "parallel-block.yaml"}
    monkeypatch.syspath_prepend(str(tmp_path))
    return Guide(tmp_path)


LAYOUTS = (Layout(tensor=2, sequence=True), Layout(pipeline=2), Layout(shard=2, zero=3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_loss_and_gradients_are_those_of_one_process(layout: Layout, guide: Guide, workers: WorkerPool) -> None:
    settings = (guide.preset,)
    assert make_config(settings).model.architecture == "parallel_block"
    traces = workers.run(train_case, 2, Case(layout, settings, micro_batch=1), 2, timeout=120)
    errors = compare(traces, train_reference(settings, 2))
    assert {kind: error for kind, error in errors.items() if error > TOLERANCES[kind]} == {}
    assert (
        compare(traces, train_reference((), 2))["loss_error"] > 10 * TOLERANCES["loss_error"]
    )  # llama is another model


SMALL = ("data.seq_len=2048", "train.batch_size=4", "train.micro_batch_size=1", "train.precision=bf16")


@pytest.mark.parametrize(
    ("world_size", "args"),
    [
        (1, ()),
        (4, ("parallel.tensor=4",)),
        (4, ("parallel.tensor=2", "train.recompute=selective")),
        (2, ("train.recompute=full",)),
        (2, ("parallel.pipeline=2",)),
    ],
    ids=str,
)
def test_a_dry_run_measures_what_its_terms_add_up_to(world_size: int, args: tuple[str, ...], guide: Guide) -> None:
    run = resolve_for_cluster(load(None, [guide.preset, *SMALL, *args]).config, world_size)
    config, layout = shorten_step(run.config, run.layout), run.layout
    measured, memory = measure(config, layout, 0), estimate_rank_memory(config, layout, 0)
    assert measured.peak_by_kind["parameters"] == pytest.approx(memory.master_bytes, rel=1e-3)
    assert measured.peak_by_kind["optimizer state"] == pytest.approx(memory.optimizer_bytes, rel=1e-3)
    assert measured.peak_by_kind["gradients"] == pytest.approx(memory.gradient_bytes, rel=1e-3)
    assert measured.peak_by_kind[ACTIVATIONS] == pytest.approx(memory.activation_bytes, rel=0.02)
    for axis, operations in estimate_traffic(config, layout, 0).items():
        assert {name: measured.sent[axis][name] for name in operations} == pytest.approx(operations, rel=1e-2), axis


def test_llama_would_be_counted_otherwise(guide: Guide) -> None:
    """The terms of the other block miss by more than the tolerance above."""
    config, other = (load(None, [guide.preset, *more]).config.model for more in ((), ("model.architecture=llama",)))
    ours, theirs = count_parameters(config), count_parameters(other)
    assert theirs.total - ours.total == 4 * 256  # one norm a block
    assert ours.block_matmul == theirs.block_matmul
    assert flops_per_token(config, 2048) == flops_per_token(other, 2048)
    memory = [
        estimate_rank_memory(run.config, run.layout, 0).activation_bytes
        for name in ("parallel_block", "llama")
        for run in [resolve_for_cluster(load(None, [guide.preset, *SMALL, f"model.architecture={name}"]).config, 1)]
    ]
    assert memory[1] > 1.1 * memory[0]


def validation_loss(run_dir: Path, layout: Layout) -> float:
    """Of the weights in the checkpoint of step 3, on any layout; every rank calls it."""
    rank, group = (dist.get_rank(), dist.group.WORLD) if dist.is_initialized() else (0, None)
    config = load(run_dir / "config.yaml").config
    engine = build_engine(config, layout, rank)
    load_checkpoint(run_dir / "checkpoints" / "step-00000003", engine.state(), group)
    engine.sync_compute_weights()
    result = engine.eval_step(microbatches_of_rank(make_batch(0), layout.data_rank(rank), layout.data, 2))
    return result.loss_sum / result.n_targets


def test_a_run_trains_generates_and_loads_on_other_layouts(
    guide: Guide, tiny_args: Callable[..., list[str]], pretrain: Pretrain, workers: WorkerPool
) -> None:
    run_dir = guide.folder / "run"
    args = tiny_args(
        run_dir,
        guide.preset,
        "train.steps=3",
        "optim.warmup=1",
        "checkpoint.every=3",
        "eval.every=3",
        "model.vocab_size=320",
    )
    assert pretrain("train", *args).code == 0
    assert pretrain("generate", run_dir, "the model", "--max-new-tokens", 4).code == 0
    alone = validation_loss(run_dir, Layout())
    for layout in (Layout(pipeline=2), Layout(shard=2)):
        losses = workers.run(validation_loss, 2, run_dir, layout)
        assert losses == pytest.approx([alone, alone], rel=1e-5)


def test_pretrain_layout_shows_it(guide: Guide, pretrain: Pretrain) -> None:
    answer = pretrain("layout", guide.preset, *SMALL, "parallel.tensor=2", "parallel.pipeline=2", "--world-size", 8)
    assert answer.code == 0, answer.err
    assert "4.00M parameters on 8 ranks" in answer.out


REFUSED: dict[str, tuple[str, str, str]] = {
    "a style that there is not": (
        'linear("colwise", "mlp")',
        'linear("columnwise", "mlp")',
        r"gives model\.layers\.0\.mlp\.gate_proj\.weight the tensor-parallel style 'columnwise'; known styles are",
    ),
    "a sum that would be forgotten": (
        'linear("rowwise", "mlp", RESIDUAL)',
        'linear("colwise", "mlp", RESIDUAL)',
        r"'model\.layers\.\*\.mlp\.down_proj' write into the residual stream .* use 'rowwise'",
    ),
    "no row": (
        '    "model.layers.*.mlp.up_proj": linear("colwise", "mlp"),\n',
        "",
        r"no row for the parameter model\.layers\.0\.mlp\.up_proj\.weight: add 'weight' to the row",
    ),
    "random values for a vector": (
        '"model.norm": norm("sequence_parallel"),',
        '"model.norm": linear("sequence_parallel", "norms"),',
        r"gives model\.norm\.weight, of shape \[256\], random initial values; .* use ONES or ZEROS",
    ),
    "no spec": ("SPEC = ", "OTHER = ", r"the module broken_\d defines no SPEC"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_in_the_file_is_refused_in_one_line(case: str, guide: Guide, pretrain: Pretrain) -> None:
    right, wrong, says = REFUSED[case]
    name = f"broken_{[*REFUSED].index(case)}"
    text = (guide.folder / "parallel_block.py").read_text()
    assert right in text
    (guide.folder / f"{name}.py").write_text(text.replace(right, wrong))
    model = load(None, [guide.preset, f"model.architecture={name}"]).config.model
    with pytest.raises(UserError, match=says):
        check_architecture(model)
    answer = pretrain("layout", guide.preset, *SMALL, f"model.architecture={name}", "--world-size", 2)
    assert answer.code == 2
    assert re.search(says, answer.err)
    assert len(answer.err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["lama", "nobody.has.this", "a..b"])
def test_an_architecture_that_is_not_there_is_refused_with_those_that_are(name: str, pretrain: Pretrain) -> None:
    answer = pretrain(
        "layout", "model.preset=tiny", "model.vocab_size=256", f"model.architecture={name}", "--world-size", 1
    )
    assert answer.code == 2
    assert answer.err.strip().endswith(
        f"model.architecture={name}: no architecture of that name (there is llama, moe), and no module of that name to "
        "import; a file of your own has to be on PYTHONPATH"
    )
