"""Constraints on layouts: whether the sizes of parallelism fit each other, the model, the batch and the processes.

They need no process group and no mesh, only resolved settings. `memory` checks whether a rank's part fits.
"""

from __future__ import annotations

import math

from parallel.errors import LayoutError
from parallel.layout import AXES, Layout
from parallel.pipeline import schedule
from pretrain.config import ParallelConfig, RunConfig
from pretrain.setup.batch_schedule import BatchSchedule
from pretrain.setup.constraints import Violation, divisors, enforce, format_choices, format_processes, format_sizes
from pretrain.setup.expert_constraints import EXPERT_CONSTRAINTS

EASIEST_TO_CHANGE = ("shard", "replicate", "context", "pipeline", "tensor")
"""Axes in the order in which a wrong number of processes is put right: data ranks change no shape."""


def build_layout(config: RunConfig, world_size: int) -> Layout:
    """The layout that resolved settings describe, after all checks.

    Raises:
        UserError: an impossible layout, in one line with the settings to change.
    """
    check_world_size(config.parallel, world_size)
    enforce(LAYOUT_CONSTRAINTS, config)
    return _layout_of(config.parallel)


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse sizes whose product is not the number of processes; `auto` must be resolved."""
    enforce((sizes_are_all_processes,), parallel, world_size)


def sizes_are_all_processes(parallel: ParallelConfig, world_size: int) -> Violation | None:
    """The product of the sizes is the number of processes."""
    sizes = {axis: getattr(parallel, axis) for axis in AXES}
    product = math.prod(sizes.values())
    if product == world_size:
        return None
    shown = {axis: size for axis, size in sizes.items() if size > 1} or {"shard": 1}
    fits = {axis: world_size * size // product for axis, size in sizes.items() if world_size * size % product == 0}
    axis = next((axis for axis in EASIEST_TO_CHANGE if axis in fits), None)
    change = f"set parallel.{axis}={fits[axis]}" if axis else "choose sizes whose product is that"
    present = "there is 1 process" if world_size == 1 else f"there are {world_size} processes"
    return Violation(
        f"{format_sizes(shown)} needs {format_processes(product)}, but {present}", f"start {product}, or {change}"
    )


def tensor_divides_model(config: RunConfig) -> Violation | None:
    """Tensor ranks share out heads, MLP and vocabulary evenly; with `replicate_kv` not the key/value heads."""
    model, tensor = config.model, config.parallel.tensor
    for name, size in _dimensions_of_tensor(config).items():
        if size % tensor == 0:
            continue
        remedy = f"use {format_choices(divisors(math.gcd(*_dimensions_of_tensor(config).values())))}"
        if name == "n_kv_heads" and tensor % model.n_kv_heads == 0:
            remedy += ", or let ranks share a head with parallel.replicate_kv=true"
        if name == "vocab_size":
            remedy += f", or model.vocab_size={-(-size // math.lcm(64, tensor)) * math.lcm(64, tensor)}"
        return Violation(f"parallel.tensor={tensor} does not divide model.{name}={size}", remedy)
    return None


def tensor_shares_kv_heads(config: RunConfig) -> Violation | None:
    """With `replicate_kv`, equally many tensor ranks hold each key/value head."""
    tensor, kv_heads = config.parallel.tensor, config.model.n_kv_heads
    if not _replicates_kv(config) or tensor % kv_heads == 0:
        return None
    sizes = divisors(math.gcd(*_dimensions_of_tensor(config).values()))
    multiples = [size for size in sizes if size % kv_heads == 0 or kv_heads % size == 0]
    return Violation(
        f"parallel.tensor={tensor} is not a multiple of model.n_kv_heads={kv_heads}, so parallel.replicate_kv cannot "
        f"share them out evenly",
        f"use {format_choices(multiples)}",
    )


def sequence_needs_tensor(config: RunConfig) -> Violation | None:
    """Sequence parallelism divides among tensor ranks."""
    if not config.parallel.sequence or config.parallel.tensor > 1:
        return None
    return Violation(
        "parallel.sequence=true divides among tensor ranks, and parallel.tensor=1",
        "use parallel.sequence=auto, or more ranks",
    )


def context_divides_sequence(config: RunConfig) -> Violation | None:
    """Context ranks get equal pieces of a sequence. All longer sequences are multiples of `data.seq_len`."""
    seq_len, parallel = config.data.seq_len, config.parallel
    if seq_len % _pieces(parallel) == 0:
        return None
    if parallel.context_method == "gather":
        pieces = f"2 x parallel.context={parallel.context} equal pieces, an early and a late one for each rank"
    else:
        pieces = f"parallel.context={parallel.context} pieces"
    return Violation(f"data.seq_len={seq_len} cannot be cut into {pieces}", _seq_len_remedy(config))


def sequence_divides_context_part(config: RunConfig) -> Violation | None:
    """Sequence parallelism divides a context rank's part of a sequence among its tensor ranks."""
    seq_len, parallel = config.data.seq_len, config.parallel
    if not parallel.sequence or seq_len % _sequence_multiple(parallel) == 0:
        return None
    part = f"data.seq_len={seq_len}"
    if parallel.context > 1:
        part += f" / parallel.context={parallel.context} = {seq_len // parallel.context}"
    return Violation(
        f"{part} is not divisible by parallel.tensor={parallel.tensor}, as parallel.sequence=true requires",
        f"{_seq_len_remedy(config)}, or parallel.sequence=false",
    )


def ulysses_divides_heads(config: RunConfig) -> Violation | None:
    """`ulysses` divides the heads of a tensor rank among the context ranks."""
    model, parallel = config.model, config.parallel
    if parallel.context_method != "ulysses":
        return None
    heads_of_rank = {
        "n_kv_heads": max(1, model.n_kv_heads // parallel.tensor),
        "n_heads": model.n_heads // parallel.tensor,
    }
    for name, heads in heads_of_rank.items():
        if heads % parallel.context == 0:
            continue
        source = f"model.{name}={getattr(model, name)}"
        if parallel.tensor > 1:
            source += f" on parallel.tensor={parallel.tensor}"
        return Violation(
            f"parallel.context={parallel.context} with parallel.context_method=ulysses does not divide the "
            f"{heads} head{'s' * (heads > 1)} of a rank ({source})",
            f"use {format_choices(divisors(heads))}, or parallel.context_method=gather",
        )
    return None


def batch_divides(config: RunConfig) -> Violation | None:
    """Data ranks get equally many rows of a full batch.

    Smaller ones need not divide: in a batch ramp, in validation and around damaged sequences some ranks have one row
    fewer, and pad.
    """
    parallel, batch = config.parallel, config.train.batch_size
    ranks = parallel.data_ranks
    if batch % ranks == 0:
        return None
    return Violation(
        f"train.batch_size={batch} is not divisible by the {ranks} data ranks "
        f"(parallel.replicate={parallel.replicate} x parallel.shard={parallel.shard})",
        f"use a multiple of {ranks}, such as {-(-batch // ranks) * ranks}",
    )


def micro_batch_is_within_batch(config: RunConfig) -> Violation | None:
    """A microbatch is at most a data rank's rows."""
    train, ranks, rows = config.train, config.parallel.data_ranks, rows_per_data_rank(config)
    if train.micro_batch_size <= rows:
        return None
    share = f"train.batch_size={train.batch_size}" + (f" / {ranks} data ranks = {rows}" if ranks > 1 else "")
    return Violation(f"train.micro_batch_size={train.micro_batch_size} is larger than {share}", "use at most that")


def longer_sequences_divide(config: RunConfig) -> Violation | None:
    """Data ranks get equally many of the longer sequences of `data.seq_len_schedule` too."""
    train, data, ranks = config.train, config.data, config.parallel.data_ranks
    for stage in data.seq_len_schedule:
        rows = train.batch_size * data.seq_len // stage.seq_len
        if rows % ranks:
            return Violation(
                f"data.seq_len_schedule: a batch of train.batch_size={train.batch_size} holds {rows} sequences of "
                f"seq_len={stage.seq_len}, which {ranks} data ranks cannot share evenly",
                f"use a batch that is a multiple of {ranks * stage.seq_len // data.seq_len}, or fewer data ranks",
            )
    return None


def micro_batch_divides_in_pipeline(config: RunConfig) -> Violation | None:
    """A pipeline takes full microbatches only."""
    rows, micro = rows_per_data_rank(config), config.train.micro_batch_size
    if config.parallel.pipeline == 1 or rows % micro == 0:
        return None
    return Violation(
        f"train.micro_batch_size={micro} does not divide the {rows} sequences of a data rank, and a pipeline takes "
        f"microbatches of one size",
        f"use {format_choices(divisors(rows))}",
    )


def stages_need_pipeline(config: RunConfig) -> Violation | None:
    """Several stages a rank need a pipeline."""
    parallel = config.parallel
    if parallel.pipeline > 1 or parallel.stages_per_rank == 1:
        return None
    return Violation(
        f"parallel.stages_per_rank={parallel.stages_per_rank} needs a pipeline, and parallel.pipeline=1",
        "use 1 or auto",
    )


def recompute_can_compile(config: RunConfig) -> Violation | None:
    """Compilation goes with the recomputation and the layout: see `compile_conflict`."""
    conflict = compile_conflict(config)
    if not config.train.compile or conflict is None:
        return None
    other = ", or parallel.schedule=interleaved or 1f1b" if _splits_backward(config) else ""
    return Violation(
        f"train.compile=true does not go with {conflict}, which would keep what compiled code writes over",
        f"use train.recompute=full, train.compile=false{other}"
        if other
        else "use train.recompute=full or train.compile=false",
    )


def schedule_fits(config: RunConfig) -> Violation | None:
    """The pipeline has a layer for every stage, and microbatches enough in every step."""
    layout = _layout_of(config.parallel)
    if layout.pipeline == 1:
        return None
    counts = BatchSchedule.from_config(config.data, config.train).microbatch_counts(layout)
    for when, count in counts.items():
        try:
            schedule.check_pipeline(layout, config.model.n_layers, count)
        except LayoutError as error:
            remedy = "; raise train.batch_ramp_start" if "ramp" in when else ""
            return Violation(f"{error} ({when}{remedy})" if when else str(error))
    return None


def reshard_needs_zero_3(config: RunConfig) -> Violation | None:
    """`reshard_to` is an option of ZeRO-3."""
    parallel = config.parallel
    if parallel.reshard_to is None or parallel.zero == 3:
        return None
    return Violation(
        f"parallel.reshard_to={parallel.reshard_to} is for parallel.zero=3, and parallel.zero={parallel.zero} does "
        f"not shard parameters",
        ("" if parallel.pipeline > 1 else "set parallel.zero=3, or ") + "leave parallel.reshard_to out",
    )


def reshard_divides_fsdp(config: RunConfig) -> Violation | None:
    """`reshard_to` divides the ranks that shard the parameters."""
    parallel = config.parallel
    ranks = parallel.shard * parallel.context
    if parallel.reshard_to is None or ranks % parallel.reshard_to == 0:
        return None
    sizes = [size for size in divisors(ranks) if size > 1]
    return Violation(
        f"parallel.reshard_to={parallel.reshard_to} does not divide the {ranks} ranks that share the parameters "
        f"(parallel.shard={parallel.shard} x parallel.context={parallel.context})",
        f"use {format_choices(sizes)}" if sizes else "leave it out",
    )


def offload_needs_cuda(config: RunConfig) -> Violation | None:
    """There is nothing to offload from a CPU."""
    if not config.parallel.offload or config.train.device == "cuda":
        return None
    return Violation(
        f"parallel.offload=true moves state from a GPU to host memory, and train.device={config.train.device}",
        "use parallel.offload=false",
    )


def async_tensor_is_possible(config: RunConfig) -> Violation | None:
    """`async_tensor` overlaps collectives with compiled matrix products of tensor parallelism on GPUs."""
    train, parallel = config.train, config.parallel
    if not parallel.async_tensor:
        return None
    needed = {
        "train.device=cuda": train.device == "cuda",
        "train.compile=true": train.compile,
        "parallel.tensor above 1": parallel.tensor > 1,
        "parallel.sequence=true": parallel.sequence,
        "a parallel.schedule that splits no backward pass (1f1b, interleaved)": not _splits_backward(config),
    }
    missing = [name for name, is_set in needed.items() if not is_set]
    if not missing:
        return None
    return Violation(
        f"parallel.async_tensor=true also needs {', '.join(missing)}", "set that, or parallel.async_tensor=false"
    )


LAYOUT_CONSTRAINTS = (
    tensor_divides_model,
    tensor_shares_kv_heads,
    sequence_needs_tensor,
    context_divides_sequence,
    sequence_divides_context_part,
    ulysses_divides_heads,
    *EXPERT_CONSTRAINTS,
    batch_divides,
    micro_batch_is_within_batch,
    longer_sequences_divide,
    micro_batch_divides_in_pipeline,
    stages_need_pipeline,
    recompute_can_compile,
    schedule_fits,
    reshard_needs_zero_3,
    reshard_divides_fsdp,
    offload_needs_cuda,
    async_tensor_is_possible,
)
"""Constraints of resolved settings, in the order in which they are checked."""


def rows_per_data_rank(config: RunConfig) -> int:
    """Sequences of a full batch that each data rank reads; `batch_divides` must hold."""
    return config.train.batch_size // config.parallel.data_ranks


def compile_conflict(config: RunConfig) -> str | None:
    """Return the settings that keep blocks from being compiled; None if they can be.

    Zero-bubble schedules compile the pieces of a block between its linear layers (`parallel.pipeline.zero_bubble`).
    Selective recomputation would then see the operators inside those pieces, and keep results in memory that compiled
    code uses again. The same holds for experts that have a mesh of their own.
    """
    if config.train.recompute != "selective":
        return None
    if _splits_backward(config):
        return f"parallel.schedule={config.parallel.schedule} and train.recompute=selective"
    if config.model.moe.n_experts and _layout_of(config.parallel).splits_experts:
        return "experts on several ranks (parallel.expert, expert_tensor or tensor) and train.recompute=selective"
    return None


def _layout_of(parallel: ParallelConfig) -> Layout:
    return Layout(**parallel.model_dump())


def _splits_backward(config: RunConfig) -> bool:
    return schedule.has_split_backward(config.parallel.pipeline, config.parallel.schedule)


def _replicates_kv(config: RunConfig) -> bool:
    return config.parallel.replicate_kv and config.parallel.tensor > config.model.n_kv_heads


def _dimensions_of_tensor(config: RunConfig) -> dict[str, int]:
    """Dimensions of the model that tensor parallelism divides."""
    model = config.model
    names = ["n_heads", *([] if _replicates_kv(config) else ["n_kv_heads"])]
    if not all(map(model.moe.has_experts, range(model.n_layers))):
        names.append("d_ff")
    return {name: getattr(model, name) for name in (*names, "vocab_size")}


def _pieces(parallel: ParallelConfig) -> int:
    """Pieces into which context parallelism cuts a sequence; `gather` gives each rank an early and a late one."""
    if parallel.context == 1:
        return 1
    return 2 * parallel.context if parallel.context_method == "gather" else parallel.context


def _sequence_multiple(parallel: ParallelConfig) -> int:
    """What `data.seq_len` must be a multiple of."""
    pieces = _pieces(parallel)
    return math.lcm(pieces, parallel.context * parallel.tensor) if parallel.sequence else pieces


def _seq_len_remedy(config: RunConfig) -> str:
    multiple = _sequence_multiple(config.parallel)
    return f"use a multiple of {multiple}, such as {-(-config.data.seq_len // multiple) * multiple}"
