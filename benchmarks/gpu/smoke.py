"""Stage 2: a model of two layers takes three steps, eager, compiled, and under FSDP2 on one rank.

All losses must agree.
"""

from __future__ import annotations

import math
import time

import torch

from benchmarks.gpu.stage import StageContext
from benchmarks.gpu.training import Case, make_config, random_microbatches
from parallel.engines.torch.build import build_parallel_engine
from parallel.layout import Layout
from parallel.world import World, process_group
from pretrain.setup.engine import build_engine, build_engine_options, build_model_spec

STEPS = 3
TOLERANCE = 5e-3
"""Relative difference of losses: eager and compiled code round bf16 differently."""

MODEL = ("model.n_layers=2", "model.d_model=256", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=512")


def train_steps(stage: StageContext, *, compiled: bool, sharded: bool) -> list[float]:
    """Build an engine, take the steps and return their losses."""
    seq_len = 64 if stage.small else 512
    compiled = compiled and not stage.small  # on a CPU compiling would take most of the time
    case = Case("smoke", preset=None, vocabulary=4096, seq_len=seq_len, rows=2, settings=MODEL, compiled=compiled)
    config = make_config(case, stage.device)
    if sharded:
        engine = build_parallel_engine(
            build_model_spec(config),
            build_engine_options(config),
            layout=Layout(zero=3),
            rank=0,
            device=torch.device(stage.device.type, 0),
        )
    else:
        engine = build_engine(config)
    losses = []
    for step in range(STEPS):
        start = time.monotonic()
        result = engine.train_step(random_microbatches(config, case, seed=step), 1.0)
        assert math.isfinite(result.grad_norm)
        losses.append(result.loss)
        numbers = f"loss {result.loss:.5f}, gradient norm {result.grad_norm:.5f}"
        print(f"step {step + 1}: {numbers}, {time.monotonic() - start:.2f} s", flush=True)
    variant = (
        f"{'compiled' if compiled else 'eager'}{', FSDP2 of one rank' if sharded else ''}, {config.train.attention}"
    )
    stage.add_row(what=variant, losses=[round(loss, 5) for loss in losses])
    return losses


def main() -> None:
    stage = StageContext(__doc__)
    eager = train_steps(stage, compiled=False, sharded=False)
    others = [train_steps(stage, compiled=True, sharded=False)]
    with process_group(World.from_environment(), stage.device.type, even_if_alone=True):
        others += [train_steps(stage, compiled=compiled, sharded=True) for compiled in (False, True)]
    max_difference = max(abs(a - b) / b for other in others for a, b in zip(other, eager, strict=True))
    stage.add_row(what="largest relative difference of a loss", value=max_difference, tolerance=TOLERANCE)
    assert max_difference < TOLERANCE
    assert eager[-1] != eager[0]


if __name__ == "__main__":
    main()
