"""`auto` sizes of `parallel.*` and of microbatches, as rules with their reasons; and the words that refusals of layouts are made of.

`pretrain.setup.resolve` applies the rules, `pretrain.setup.layout` checks what comes of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from parallel.layout import AXES
from pretrain.config import AUTO, RunConfig
from pretrain.errors import UserError
from pretrain.optim.schedule import batch_size_at

INTERLEAVED = ("interleaved", "interleaved_zero_bubble")
"""Schedules whose microbatches go through the ranks in rounds of `parallel.pipeline`."""

MICRO_BATCH_TOKENS = 16_384
"""Tokens in one forward and backward pass of a rank that keep a GPU busy and a laptop's memory free."""

RAMP_PADDING = 0.1
"""Largest share of padding sequences, over the whole run, that `auto` accepts for a batch ramp."""


def replicate_rule(config: RunConfig, world_size: int) -> tuple[object, str]:
    """`parallel.replicate=auto`: what is left, where `shard` leaves something."""
    if config.parallel.shard == AUTO:
        return 1, "parallel.shard=auto takes all that is left"
    return _left(config, "replicate", world_size)


def shard_rule(config: RunConfig, world_size: int) -> tuple[object, str]:
    """`parallel.shard=auto`: what the other sizes leave of the processes."""
    return _left(config, "shard", world_size)


def zero_rule(config: RunConfig) -> tuple[object, str]:
    """`parallel.zero=auto`."""
    if config.parallel.pipeline > 1:
        return 2, "in a pipeline 3 would gather the parameters for every microbatch and keep them all the same"
    return 3, "the least memory"


def sequence_rule(config: RunConfig) -> tuple[object, str]:
    """`parallel.sequence=auto`."""
    tensor = config.parallel.tensor
    return tensor > 1, f"parallel.tensor={tensor}"


def stages_rule(config: RunConfig) -> tuple[object, str]:
    """`parallel.stages_per_rank=auto`."""
    parallel = config.parallel
    several = parallel.pipeline > 1 and parallel.schedule in (*INTERLEAVED, "zbv")
    return (2 if several else 1), f"parallel.pipeline={parallel.pipeline}, parallel.schedule={parallel.schedule}"


def micro_batch_rule(config: RunConfig) -> tuple[object, str]:
    """`train.micro_batch_size=auto`: the largest that divides what a data rank reads and holds few enough tokens.

    Every microbatch has this size, those of a batch ramp are filled up: a size that makes the ramp too dear is passed over.

    With a pipeline there should be 2 microbatches a rank of it, so that two thirds of a step or more are work, or at least one; and
    interleaved schedules want them in whole rounds.
    """
    parallel, rows = config.parallel, sequences_per_rank(config)
    fits = max(1, MICRO_BATCH_TOKENS * parallel.context // config.data.seq_len)
    largest = [size for size in divisors(rows) if size <= fits]
    sizes = [size for size in largest if _ramp_padding(config, size) <= RAMP_PADDING]
    share = f"the batch of {rows}" if data_ranks(config) == 1 else f"the {rows} sequences of a data rank"
    reason = f"divides {share}, at most {MICRO_BATCH_TOKENS:,} tokens a pass"
    if len(sizes) < len(largest):
        reason += f", fills up at most {RAMP_PADDING:.0%} of the run's sequences in the batch ramp"
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
    """Sequences that fill up microbatches of that size in the batch ramp, as a part of all that a data rank computes in the run."""
    train, ranks = config.train, data_ranks(config)
    ramped = min(train.steps, train.batch_ramp_steps)
    steps_of_rows = Counter(-(-batch_size_at(step, train) // ranks) for step in range(1, ramped + 1))
    padding = sum(steps * (-rows % micro_batch) for rows, steps in steps_of_rows.items())
    return padding / (
        padding
        + sum(steps * rows for rows, steps in steps_of_rows.items())
        + (train.steps - ramped) * (train.batch_size // ranks)
    )


def padding_note(config: RunConfig) -> str | None:
    """What a user should know where the microbatches of every step are filled up, and how to avoid it; None where they are full."""
    rows, micro = sequences_per_rank(config), config.train.micro_batch_size
    padding = -rows % micro
    if not padding:
        return None
    share = f"train.batch_size={rows}" if data_ranks(config) == 1 else f"the {rows} sequences of a data rank"
    way_out = choices([size for size in divisors(rows) if size <= micro])
    return (
        f"train.micro_batch_size={micro} does not divide {share}: each step also computes {padding} empty sequence{'s' * (padding > 1)}, "
        f"so that all microbatches have one size; train.micro_batch_size={way_out} would need none"
    )


def data_ranks(config: RunConfig) -> int:
    """Ranks that read different sequences; the sizes must be resolved."""
    return config.parallel.replicate * config.parallel.shard


def sequences_per_rank(config: RunConfig) -> int:
    """Sequences of a whole batch that each data rank reads.

    Only whole batches must divide: in a batch ramp, in validation and around damaged sequences some ranks have one sequence fewer, and
    fill up with one that counts for nothing.
    """
    ranks, batch = data_ranks(config), config.train.batch_size
    if batch % ranks:
        nearest = -(-batch // ranks) * ranks
        raise UserError(
            f"train.batch_size={batch} is not divisible by the {ranks} data ranks (parallel.replicate={config.parallel.replicate} x "
            f"parallel.shard={config.parallel.shard}): use a multiple of {ranks}, such as {nearest}"
        )
    return batch // ranks


def choices(values: Iterable[int]) -> str:
    """`1, 2, 4 or 8`."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _left(config: RunConfig, axis: str, world_size: int) -> tuple[object, str]:
    """(what the other axes leave of the processes, why)."""
    others = {name: size for name, size in sizes_of(config).items() if name != axis and size != AUTO and size > 1}
    product = math.prod(others.values())
    if world_size % product:
        way_out = f"use {choices(divisors(world_size))}" if len(others) == 1 else "change one of them"
        raise UserError(
            f"{told(others)} does not divide the {processes(world_size)}: {way_out}, or start {product} or a multiple of that"
        )
    left = world_size // product
    return left, f"what {told(others)} leaves of {processes(world_size)}" if others else f"all {processes(world_size)}"


def sizes_of(config: RunConfig) -> dict[str, int]:
    """The size of each axis, outermost first; `auto` where it is not resolved."""
    return {axis: getattr(config.parallel, axis) for axis in AXES}


def told(sizes: dict[str, int]) -> str:
    """`parallel.pipeline=2 x parallel.tensor=4 = 8`."""
    product = f" = {math.prod(sizes.values())}" if len(sizes) > 1 else ""
    return " x ".join(f"parallel.{axis}={size}" for axis, size in sizes.items()) + product


def processes(count: int) -> str:
    """`8 processes`."""
    return f"{count} processes" if count > 1 else "1 process"
