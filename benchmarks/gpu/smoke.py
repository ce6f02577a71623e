"""Stage 2: a model of two layers takes three steps, eager, compiled, and under FSDP2 in a group of one rank. All losses must agree."""

from __future__ import annotations

import math
import time

import torch

from benchmarks.gpu.stage import StageContext
from benchmarks.gpu.training import Case, config_of, microbatches_of
from parallel.engines.torch.build import build_parallel_engine
from parallel.layout import Layout
from parallel.world import World, process_group
from pretrain.setup.engine import build_engine, build_engine_options, build_model_spec

STEPS = 3
TOLERANCE = 5e-3
"""Relative: bf16, whose rounding differs between eager and compiled code."""

MODEL = ("model.n_layers=2", "model.d_model=256", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=512")


def losses(stage: StageContext, *, compiled: bool, sharded: bool) -> list[float]:
    seq_len = 64 if stage.small else 512
    compiled = compiled and not stage.small  # on a CPU the compiler would take most of the time
    case = Case("smoke", preset=None, vocabulary=4096, seq_len=seq_len, rows=2, model=MODEL, compiled=compiled)
    config = config_of(case, stage.device)
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
    found = []
    for step in range(STEPS):
        began = time.monotonic()
        result = engine.train_step(microbatches_of(config, case, seed=step), 1.0)
        assert math.isfinite(result.grad_norm)
        found.append(result.loss)
        print(
            f"step {step + 1}: loss {result.loss:.5f}, gradient norm {result.grad_norm:.5f}, {time.monotonic() - began:.2f} s",
            flush=True,
        )
    how = f"{'compiled' if compiled else 'eager'}{', FSDP2 of one rank' if sharded else ''}, {config.train.attention}"
    stage.row(what=how, losses=[round(loss, 5) for loss in found])
    return found


def main() -> None:
    stage = StageContext(__doc__)
    eager = losses(stage, compiled=False, sharded=False)
    others = [losses(stage, compiled=True, sharded=False)]
    with process_group(World.from_environment(), stage.device.type, even_if_alone=True):
        others += [losses(stage, compiled=compiled, sharded=True) for compiled in (False, True)]
    worst = max(abs(a - b) / b for other in others for a, b in zip(other, eager, strict=True))
    stage.row(what="largest relative difference of a loss", value=worst, tolerance=TOLERANCE)
    assert worst < TOLERANCE
    assert eager[-1] != eager[0]


if __name__ == "__main__":
    main()
