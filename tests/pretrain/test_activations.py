"""What a rank is estimated to keep for its backward passes is what a step of it has at its most, measured without
memory."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from parallel.layout import Layout
from parallel.simulate.memory import ACTIVATIONS
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.estimate import activations
from pretrain.estimate.block_activations import activation_sizes
from pretrain.estimate.rank_memory import estimate_rank_memory
from pretrain.model import activation_terms
from pretrain.model.activation_terms import ActivationSizes
from pretrain.setup.dry_run import Measured, measure, shorten_step
from pretrain.setup.resolve import resolve_for_cluster

SMALL = (
    *(
        "model.n_layers=4",
        "model.d_model=256",
        "model.n_heads=8",
        "model.n_kv_heads=4",
        "model.d_ff=704",
        "model.vocab_size=2048",
    ),
    *("data.seq_len=4096", "train.micro_batch_size=1", "train.precision=bf16"),
)
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one process": (1, 0, ("train.batch_size=2", "model.qk_norm=true")),
    "fp32": (1, 0, ("train.batch_size=2", "train.precision=fp32", "model.tie_embeddings=true")),
    "large vocabulary": (4, 0, ("train.batch_size=8", "model.vocab_size=32768", "data.seq_len=1024")),
    "tensor": (4, 0, ("train.batch_size=2", "parallel.tensor=4")),
    "without sequence": (4, 0, ("train.batch_size=2", "parallel.tensor=4", "parallel.sequence=false")),
    "gather": (2, 1, ("train.batch_size=2", "parallel.context=2", "train.micro_batch_size=2", "model.head_dim=64")),
    "ulysses": (
        2,
        0,
        ("train.batch_size=1", "parallel.context=2", "parallel.context_method=ulysses", "model.head_dim=64"),
    ),
    "1f1b, first": (4, 0, ("train.batch_size=4", "parallel.pipeline=4")),
    "gpipe, last": (2, 1, ("train.batch_size=4", "parallel.pipeline=2", "parallel.schedule=gpipe")),
    "interleaved, first": (2, 0, ("train.batch_size=4", "parallel.pipeline=2", "parallel.schedule=interleaved")),
    "zbv, last": (2, 1, ("train.batch_size=8", "parallel.pipeline=2", "parallel.schedule=zbv", "train.recompute=full")),
    "interleaved zero bubble": (
        2,
        0,
        ("train.batch_size=8", "parallel.pipeline=2", "parallel.schedule=interleaved_zero_bubble"),
    ),
    "all at once": (
        64,
        63,
        (
            "train.batch_size=32",
            "parallel.pipeline=2",
            "parallel.tensor=2",
            "parallel.context=2",
            "parallel.replicate=2",
        ),
    ),
    "full": (2, 0, ("train.batch_size=2", "train.recompute=full", "parallel.zero=3")),
    "selective": (2, 0, ("train.batch_size=2", "parallel.tensor=2", "train.recompute=selective")),
    "every second": (1, 0, ("train.batch_size=1", "train.recompute=full", "train.recompute_every=2")),
}
"""(processes, rank, settings)."""

WITHIN = 0.05
Layer = Callable[[ActivationSizes], ActivationSizes]


def planned(case: str) -> tuple[RunConfig, Layout, int]:
    world_size, rank, args = CASES[case]
    resolved = resolve_for_cluster(load(None, [*SMALL, *args]).config, world_size)
    return shorten_step(resolved.config, resolved.layout), resolved.layout, rank


@pytest.fixture(scope="module")
def measured() -> Callable[[str], Measured]:
    steps: dict[str, Measured] = {}

    def step(case: str) -> Measured:
        return steps[case] if case in steps else steps.setdefault(case, measure(*planned(case)))

    return step


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_5_percent_of_the_peak(case: str, measured: Callable[[str], Measured]) -> None:
    most, peak = measured(case).peak_by_kind[ACTIVATIONS], measured(case).peak
    assert most > 0.2 * peak  # else it would be the estimate of something else
    assert estimate_rank_memory(*planned(case)).activation_bytes == pytest.approx(most, rel=WITHIN)


REMOVED_TERMS: dict[str, tuple[str, Layer]] = {
    "fp32 copies in norms": ("one process", lambda x: replace(x, stream_fp32=0.0)),
    "gathered inputs": ("tensor", lambda x: replace(x, whole=x.stream)),
    "attention's output, put together": ("ulysses", lambda x: replace(x, outputs=1)),
    "keys of whole rows": ("gather", lambda x: replace(x, rows=1.0)),
    "silu(gate)": ("1f1b, first", lambda x: replace(x, compiled=True)),
}


@pytest.mark.parametrize("term", REMOVED_TERMS)
def test_without_one_of_its_terms_the_estimate_misses(
    term: str, measured: Callable[[str], Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, forget = REMOVED_TERMS[term]
    monkeypatch.setattr(activations, "activation_sizes", lambda *given: forget(activation_sizes(*given)))
    assert (
        estimate_rank_memory(*planned(case)).activation_bytes < (1 - WITHIN) * measured(case).peak_by_kind[ACTIVATIONS]
    )


def test_without_the_inputs_kept_for_weight_gradients_the_estimate_misses(
    measured: Callable[[str], Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "kept_for_weights", lambda _: 0.0)
    assert (
        estimate_rank_memory(*planned("zbv, last")).activation_bytes
        < (1 - WITHIN) * measured("zbv, last").peak_by_kind[ACTIVATIONS]
    )


@pytest.mark.parametrize("case", ["full", "every second"])
def test_without_the_temporaries_of_the_backward_pass_the_estimate_misses(
    case: str, measured: Callable[[str], Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = activations._blocks
    monkeypatch.setattr(
        activations,
        "_blocks",
        lambda *given: {layer: replace(block, backward_peak=0.0) for layer, block in blocks(*given).items()},
    )
    monkeypatch.setattr(activations, "NORM_BACKWARD", 0)
    assert activation_terms.NORM_BACKWARD == 5
    assert (
        estimate_rank_memory(*planned(case)).activation_bytes < (1 - WITHIN) * measured(case).peak_by_kind[ACTIVATIONS]
    )
