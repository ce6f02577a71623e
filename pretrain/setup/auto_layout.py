"""What `auto` becomes for the sizes of `parallel.*` and of microbatches: rules, each with its reason."""

from __future__ import annotations

import math
from collections import Counter

from parallel.layout import AXES
from pretrain.config import AUTO, ParallelConfig, RunConfig
from pretrain.optim.schedule import batch_size_at
from pretrain.setup.constraints import Violation, divisors, enforce, format_choices, format_processes, format_sizes
from pretrain.setup.layout_constraints import batch_divides, check_world_size, rows_per_data_rank

INTERLEAVED = ("interleaved", "interleaved_zero_bubble")
"""Schedules whose microbatches go through the ranks in rounds of `parallel.pipeline`."""

MICRO_BATCH_TOKENS = 16_384
"""Tokens in one forward and backward pass of a rank that keep a GPU busy and a laptop's memory free."""

MAX_RAMP_PADDING = 0.1
"""Largest share of padding sequences, over the whole run, that `auto` accepts for a batch ramp."""


def replicate_rule(config: RunConfig, *, world_size: int) -> tuple[object, str]:
    """`parallel.replicate=auto`: the processes that the other sizes leave, if `shard` is a number."""
    if config.parallel.shard == AUTO:
        return 1, "parallel.shard=auto takes all that is left"
    return _remaining_processes(config.parallel, "replicate", world_size)


def shard_rule(config: RunConfig, *, world_size: int) -> tuple[object, str]:
    """`parallel.shard=auto`: the processes that the other sizes leave."""
    return _remaining_processes(config.parallel, "shard", world_size)


def zero_rule(config: RunConfig) -> tuple[object, str]:
    """`parallel.zero=auto`: the stage of ZeRO."""
    if config.parallel.pipeline > 1:
        return 2, "in a pipeline 3 would gather the parameters for every microbatch and keep them all the same"
    return 3, "the least memory"


def sequence_rule(config: RunConfig) -> tuple[object, str]:
    """`parallel.sequence=auto`: on with tensor parallelism."""
    tensor = config.parallel.tensor
    return tensor > 1, f"parallel.tensor={tensor}"


def stages_rule(config: RunConfig) -> tuple[object, str]:
    """`parallel.stages_per_rank=auto`: 2 for the schedules that need several."""
    parallel = config.parallel
    several = parallel.pipeline > 1 and parallel.schedule in (*INTERLEAVED, "zbv")
    return (2 if several else 1), f"parallel.pipeline={parallel.pipeline}, parallel.schedule={parallel.schedule}"


def micro_batch_rule(config: RunConfig, *, world_size: int) -> tuple[object, str]:
    """`train.micro_batch_size=auto`: the largest divisor of a data rank's rows that holds few enough tokens.

    Every microbatch has this size, and those of a batch ramp are padded: a size that pads too much is skipped.

    A pipeline of p ranks should have 2p microbatches, which keeps the bubble below a third of the step, or at least p.
    Interleaved schedules need a multiple of p.

    Raises:
        UserError: no size is possible, as the layout does not fit the processes or the batch.
    """
    parallel = config.parallel
    check_world_size(parallel, world_size)
    enforce((batch_divides,), config)
    rows = rows_per_data_rank(config)
    fits = max(1, MICRO_BATCH_TOKENS * parallel.context // config.data.seq_len)
    small_enough = [size for size in divisors(rows) if size <= fits]
    sizes = [size for size in small_enough if _ramp_padding(config, size) <= MAX_RAMP_PADDING]
    alone = parallel.data_ranks == 1
    share = f"the batch of {rows}" if alone else f"the {rows} sequences of a data rank"
    reason = f"divides {share}, at most {MICRO_BATCH_TOKENS:,} tokens a pass"
    if len(sizes) < len(small_enough):
        reason += f", fills up at most {MAX_RAMP_PADDING:.0%} of the run's sequences in the batch ramp"
    if parallel.pipeline == 1:
        return sizes[-1], reason
    if parallel.schedule in INTERLEAVED:
        sizes = [size for size in sizes if rows // size % parallel.pipeline == 0] or sizes
    for wanted in (2 * parallel.pipeline, parallel.pipeline):
        enough = [size for size in sizes if rows // size >= wanted]
        if enough:
            return enough[-1], f"{reason}, {rows // enough[-1]} microbatches for parallel.pipeline={parallel.pipeline}"
    return sizes[0], reason


def _ramp_padding(config: RunConfig, micro_batch: int) -> float:
    """Share of padding among all the rows that a data rank computes in the run, for microbatches of that size."""
    train, ranks = config.train, config.parallel.data_ranks
    ramped = min(train.steps, train.batch_ramp_steps)
    steps_by_rows = Counter(-(-batch_size_at(step, train) // ranks) for step in range(1, ramped + 1))
    padding = sum(steps * (-rows % micro_batch) for rows, steps in steps_by_rows.items())
    in_ramp = sum(steps * rows for rows, steps in steps_by_rows.items())
    after_ramp = (train.steps - ramped) * (train.batch_size // ranks)
    return padding / (padding + in_ramp + after_ramp)


def _remaining_processes(parallel: ParallelConfig, axis: str, world_size: int) -> tuple[object, str]:
    """The processes that the sizes of the other axes leave for `axis`, and why.

    Raises:
        UserError: the other sizes do not divide the processes.
    """
    sizes = {name: getattr(parallel, name) for name in AXES if name != axis}
    others = {name: size for name, size in sizes.items() if size != AUTO and size > 1}
    enforce((_sizes_divide_processes,), others, world_size)
    left = world_size // math.prod(others.values())
    if not others:
        return left, f"all {format_processes(world_size)}"
    return left, f"what {format_sizes(others)} leaves of {format_processes(world_size)}"


def _sizes_divide_processes(sizes: dict[str, int], world_size: int) -> Violation | None:
    product = math.prod(sizes.values())
    if world_size % product == 0:
        return None
    change = f"use {format_choices(divisors(world_size))}" if len(sizes) == 1 else "change one of them"
    return Violation(
        f"{format_sizes(sizes)} does not divide the {format_processes(world_size)}",
        f"{change}, or start {product} or a multiple of that",
    )
