"""Settings -> a layout that can be: every check that needs no process group, each refusal one line with the way out.

Starts nothing; knows no mesh. What it checks are the numbers alone; whether a rank's part fits into its memory is asked in `memory`.
"""

from __future__ import annotations

import math

from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.pipeline import schedule
from pretrain.config import RunConfig
from pretrain.errors import UserError
from pretrain.optim.schedule import batch_size_at
from pretrain.setup.layout_rules import choices, data_ranks, divisors, processes, sequences_per_rank, sizes_of, told

EASIEST_TO_CHANGE = ("shard", "replicate", "context", "pipeline", "tensor")
"""Axes in the order in which a wrong number of processes is put right: data ranks change no shape."""


def layout_of(config: RunConfig, world_size: int) -> Layout:
    """The layout of a resolved config on that many processes.

    Checks what the numbers alone decide; whether it fits into memory is asked of `pretrain.setup.memory`.

    Raises:
        UserError: a layout that cannot be, in one line with the settings to change.
    """
    parallel = config.parallel
    check_world(config, world_size)
    layout = Layout(
        pipeline=parallel.pipeline,
        replicate=parallel.replicate,
        shard=parallel.shard,
        context=parallel.context,
        tensor=parallel.tensor,
        zero=parallel.zero,
        reshard_to=parallel.reshard_to,
        prefetch=parallel.prefetch,
        offload=parallel.offload,
        sequence=parallel.sequence,
        replicate_kv=parallel.replicate_kv,
        async_tensor=parallel.async_tensor,
        schedule=parallel.schedule,
        stages_per_rank=parallel.stages_per_rank,
        context_method=parallel.context_method,
    )
    _check_tensor(config)
    _check_sequences(config)
    _check_ulysses(config)
    _check_batches(config, layout)
    _check_pipeline(config, layout)
    _check_sharding(config, layout)
    _check_device(config)
    return layout


def microbatch_counts(config: RunConfig) -> dict[str, int]:
    """Microbatches of a step on each data rank: {what the step is like: how many}, whole batches first."""
    data, train, ranks = config.data, config.train, data_ranks(config)
    counts = {"": -(-train.batch_size // ranks // train.micro_batch_size)}
    for stage in data.growth:
        rows = -(-train.batch_size * data.seq_len // stage.seq_len // ranks)
        micro = max(1, train.micro_batch_size * data.seq_len // stage.seq_len)
        counts[f"in sequences of data.growth: seq_len={stage.seq_len}"] = -(-rows // micro)
    for batch in sorted({batch_size_at(step, train) for step in range(1, train.batch_ramp_steps + 1)}):
        counts[f"in the batch ramp, at {batch} sequences"] = -(-batch // ranks // train.micro_batch_size)
    return counts


def check_world(config: RunConfig, world_size: int) -> None:
    """UserError unless the product of the sizes, which must be resolved, is the number of processes."""
    if config.parallel.expert > 1:
        raise UserError(f"parallel.expert={config.parallel.expert} divides experts, and this model has none: use 1")
    sizes = sizes_of(config)
    product = math.prod(sizes.values())
    if product == world_size:
        return
    shown = {axis: size for axis, size in sizes.items() if size > 1} or {"shard": 1}
    fits = {axis: world_size * size // product for axis, size in sizes.items() if world_size * size % product == 0}
    axis = next((axis for axis in EASIEST_TO_CHANGE if axis in fits), None)
    way_out = f"set parallel.{axis}={fits[axis]}" if axis else "choose sizes whose product is that"
    there = "there is 1 process" if world_size == 1 else f"there are {world_size} processes"
    raise UserError(f"{told(shown)} wants {processes(product)}, but {there}: start {product}, or {way_out}")


def _check_tensor(config: RunConfig) -> None:
    model, parallel = config.model, config.parallel
    tensor, kv_heads = parallel.tensor, model.n_kv_heads
    replicated = parallel.replicate_kv and tensor > kv_heads
    dimensions = {"n_heads": model.n_heads, "n_kv_heads": kv_heads, "d_ff": model.d_ff, "vocab_size": model.vocab_size}
    if replicated:
        del dimensions["n_kv_heads"]
    fits = divisors(math.gcd(*dimensions.values()))
    for name, size in dimensions.items():
        if size % tensor:
            way_out = ""
            if name == "n_kv_heads" and tensor % kv_heads == 0:
                way_out = ", or let ranks share a head with parallel.replicate_kv=true"
            if name == "vocab_size":
                way_out = f", or model.vocab_size={-(-size // math.lcm(64, tensor)) * math.lcm(64, tensor)}"
            raise UserError(
                f"parallel.tensor={tensor} does not divide model.{name}={size}: use {choices(fits)}{way_out}"
            )
    if replicated and tensor % kv_heads:
        multiples = [size for size in fits if size % kv_heads == 0 or kv_heads % size == 0]
        raise UserError(
            f"parallel.tensor={tensor} is not a multiple of model.n_kv_heads={kv_heads}, so parallel.replicate_kv cannot share them "
            f"out evenly: use {choices(multiples)}"
        )
    if parallel.sequence and tensor == 1:
        raise UserError(
            "parallel.sequence=true divides among tensor ranks, and parallel.tensor=1: use parallel.sequence=auto, or more ranks"
        )


def _check_sequences(config: RunConfig) -> None:
    """Of all lengths only data.seq_len needs a look: sequences grow to multiples of it, and a window is a multiple of the longest."""
    seq_len, parallel = config.data.seq_len, config.parallel
    context, tensor = parallel.context, parallel.tensor
    by_context = (2 * context if parallel.context_method == "gather" else context) if context > 1 else 1
    needed = math.lcm(by_context, context * tensor) if parallel.sequence else by_context
    way_out = f"use a multiple of {needed}, such as {-(-seq_len // needed) * needed}"
    if seq_len % by_context:
        pieces = f"2 x parallel.context={context} equal pieces, an early and a late one for each rank"
        pieces = pieces if parallel.context_method == "gather" else f"parallel.context={context} pieces"
        raise UserError(f"data.seq_len={seq_len} cannot be cut into {pieces}: {way_out}")
    if seq_len % needed:
        held = f"data.seq_len={seq_len}" + (
            f" / parallel.context={context} = {seq_len // context}" if context > 1 else ""
        )
        raise UserError(
            f"{held} is not divisible by parallel.tensor={tensor}, as parallel.sequence=true wants: {way_out}, or parallel.sequence=false"
        )


def _check_ulysses(config: RunConfig) -> None:
    model, parallel = config.model, config.parallel
    if parallel.context_method != "ulysses":
        return
    for name, heads in (
        ("n_kv_heads", max(1, model.n_kv_heads // parallel.tensor)),
        ("n_heads", model.n_heads // parallel.tensor),
    ):
        if heads % parallel.context:
            held = f"model.{name}={getattr(model, name)}" + (
                f" on parallel.tensor={parallel.tensor}" if parallel.tensor > 1 else ""
            )
            divided = f"{heads} head{'s' * (heads > 1)}"
            raise UserError(
                f"parallel.context={parallel.context} with parallel.context_method=ulysses does not divide the {divided} of a rank "
                f"({held}): use {choices(divisors(heads))}, or parallel.context_method=gather"
            )


def _check_batches(config: RunConfig, layout: Layout) -> None:
    train, data = config.train, config.data
    rows, micro = sequences_per_rank(config), train.micro_batch_size
    if micro > rows:
        share = f"train.batch_size={train.batch_size}" + (
            f" / {layout.data} data ranks = {rows}" if layout.data > 1 else ""
        )
        raise UserError(f"train.micro_batch_size={micro} is larger than {share}; use at most that")
    for stage in data.growth:
        longer = train.batch_size * data.seq_len // stage.seq_len
        if longer % layout.data:
            fits = layout.data * stage.seq_len // data.seq_len
            raise UserError(
                f"data.growth: a batch of train.batch_size={train.batch_size} holds {longer} sequences of seq_len={stage.seq_len}, which "
                f"{layout.data} data ranks cannot share evenly: use a batch that is a multiple of {fits}, or fewer data ranks"
            )
    if layout.pipeline > 1 and rows % micro:
        raise UserError(
            f"train.micro_batch_size={micro} does not divide the {rows} sequences of a data rank, and a pipeline takes microbatches of one "
            f"size: use {choices(divisors(rows))}"
        )


def compiles(config: RunConfig) -> bool:
    """Whether blocks can be compiled. Where some of their layers are not (`parallel.pipeline.zero_bubble`), recomputation is around the pieces that
    are, sees operators inside of them, and would keep results in memory that the compiler uses again."""
    return not (
        schedule.has_split_backward(config.parallel.pipeline, config.parallel.schedule)
        and config.train.recompute == "selective"
    )


def _check_pipeline(config: RunConfig, layout: Layout) -> None:
    if layout.pipeline == 1:
        if layout.stages_per_rank > 1:
            raise UserError(
                f"parallel.stages_per_rank={layout.stages_per_rank} needs a pipeline, and parallel.pipeline=1: use 1 or auto"
            )
        return
    if config.train.compile and not compiles(config):
        raise UserError(
            f"train.compile=true does not go with parallel.schedule={config.parallel.schedule} and train.recompute=selective, which would "
            f"keep what compiled code writes over; use train.recompute=full, train.compile=false, or parallel.schedule=interleaved or 1f1b"
        )
    for when, count in microbatch_counts(config).items():
        try:
            schedule.check_pipeline(layout, config.model.n_layers, count)
        except LayoutError as error:
            ramp = "; raise train.batch_ramp_start" if "ramp" in when else ""
            raise UserError(f"{error} ({when}{ramp})" if when else str(error)) from None


def _check_sharding(config: RunConfig, layout: Layout) -> None:
    if layout.reshard_to is not None and layout.zero != 3:
        raise UserError(
            f"parallel.reshard_to={layout.reshard_to} is for parallel.zero=3, and parallel.zero={layout.zero} keeps parameters whole: "
            + ("" if layout.pipeline > 1 else "set parallel.zero=3, or ")
            + "leave parallel.reshard_to out"
        )
    if layout.reshard_to is not None and layout.fsdp % layout.reshard_to:
        ways = [size for size in divisors(layout.fsdp) if size > 1]
        use = f"use {choices(ways)}" if ways else "leave it out"
        raise UserError(
            f"parallel.reshard_to={layout.reshard_to} does not divide the {layout.fsdp} ranks that share the parameters "
            f"(parallel.shard={layout.shard} x parallel.context={layout.context}): {use}"
        )


def _check_device(config: RunConfig) -> None:
    train, parallel = config.train, config.parallel
    if parallel.offload and train.device != "cuda":
        raise UserError(
            f"parallel.offload=true moves state from a GPU to host memory, and train.device={train.device}: use parallel.offload=false"
        )
    if not parallel.async_tensor:
        return
    products_are_compiled = not schedule.has_split_backward(parallel.pipeline, parallel.schedule)
    wanted = {
        "train.device=cuda": train.device == "cuda",
        "train.compile=true": train.compile,
        "parallel.tensor above 1": parallel.tensor > 1,
        "parallel.sequence=true": parallel.sequence,
        "a parallel.schedule that splits no backward pass (1f1b, interleaved)": products_are_compiled,
    }
    missing = [name for name, there in wanted.items() if not there]
    if missing:
        raise UserError(
            f"parallel.async_tensor=true also wants {', '.join(missing)}: set that, or parallel.async_tensor=false"
        )
