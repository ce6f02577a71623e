"""The one stage that decides a run: settings and processes go in, a `ResolvedRun` comes out. Nothing is decided later.

`resolve_run` decides for this machine, `resolve_for_cluster` for GPUs that are not here (the dry run and
`pretrain layout`). Both read the machine but no data, and change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from rich.text import Text

from data_pipeline.tokenizing.tokenizer import load_tokenizer
from parallel.layout import Layout
from parallel.pipeline.torch_schedules import describe_pipeline
from pretrain.config import AUTO, RunConfig, flatten, on_resume
from pretrain.config.loading import validate
from pretrain.errors import UserError
from pretrain.estimate.flops import pipeline_costs
from pretrain.estimate.parameters import check_architecture
from pretrain.estimate.rank_memory import RankMemory, estimate_rank_memory, find_peak_rank
from pretrain.optim import schedule
from pretrain.setup import auto_layout
from pretrain.setup.batch_schedule import BatchSchedule, check_seq_lens
from pretrain.setup.constraints import Violation, divisors, enforce, format_choices
from pretrain.setup.layout_constraints import build_layout, rows_per_data_rank
from pretrain.setup.machine import GPU_CLUSTER, THIS_MACHINE, Machine, Rule
from pretrain.setup.memory import batch_fits_host, state_fits_device

VOCAB_MULTIPLE = 64
"""Vocabulary sizes are rounded up to this: matrix units want it, and it leaves room for tensor parallelism."""

WARMUP_DIVISOR = 10
MAX_WARMUP = 2000
"""`auto` warm-up: `train.steps // WARMUP_DIVISOR`, but no longer than published runs of any size commonly take."""


@dataclass(frozen=True)
class Decision:
    """A setting that said `auto`, what it became, and why."""

    key: str
    value: object
    reason: str

    def as_text(self) -> Text:
        """Return `key = value (reason)` for a terminal."""
        return Text.assemble((f"{self.key} = ", "dim"), str(self.value), (f" ({self.reason})", "dim"))


@dataclass(frozen=True)
class ResolvedRun:
    """Everything that is decided about a run before it begins."""

    config: RunConfig
    """Without `auto`."""

    decisions: tuple[Decision, ...]
    """What `auto` became, with the reasons."""

    layout: Layout

    batches: BatchSchedule
    """Which samples each step reads."""

    @property
    def reported_decisions(self) -> tuple[Decision, ...]:
        """The decisions for the log of the run: one process has nothing to divide."""
        alone = self.layout.world_size == 1
        return tuple(d for d in self.decisions if not (alone and d.key.startswith("parallel.")))

    @cached_property
    def peak_rank(self) -> int:
        """The rank whose parameters and state take the most memory."""
        return find_peak_rank(self.config, self.layout)

    @cached_property
    def memory(self) -> RankMemory:
        """What `peak_rank` holds."""
        return estimate_rank_memory(self.config, self.layout, self.peak_rank)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know although nothing is wrong, with the setting that would change it."""
        rows, micro = rows_per_data_rank(self.config), self.config.train.micro_batch_size
        padding = -rows % micro
        if not padding:
            return ()
        share = f"train.batch_size={rows}" if self.layout.data == 1 else f"the {rows} sequences of a data rank"
        sizes = format_choices([size for size in divisors(rows) if size <= micro])
        return (
            f"train.micro_batch_size={micro} does not divide {share}: each step also computes {padding} empty "
            f"sequence{'s' * (padding > 1)}, so that all microbatches have one size; train.micro_batch_size={sizes} "
            f"would need none",
        )

    @property
    def pipeline(self) -> str:
        """The stages of the pipeline and how long its ranks wait, in one sentence; empty without a pipeline."""
        if self.layout.pipeline == 1:
            return ""
        n_microbatches = self.batches.microbatch_counts(self.layout)[""]
        return describe_pipeline(self.layout, pipeline_costs(self.config.model), n_microbatches)


def resolve_run(
    config: RunConfig,
    *,
    tokenizer_size: int,
    world_size: int = 1,
    previous: RunConfig | None = None,
    machine: Machine = THIS_MACHINE,
) -> ResolvedRun:
    """Decide every `auto` once, and check all that only shows when the settings are seen together.

    Args:
        config: as the user gave it.
        tokenizer_size: tokens of the tokenizer the data was made with.
        world_size: processes of the run.
        previous: the config of the run that is resumed. Its decisions hold where the numbers of the run depend on them.
        machine: where the run takes place.

    Raises:
        UserError: settings that do not go together, or that this machine cannot do.
    """
    enforce(machine.device_constraints, config)
    kept = {} if previous is None else _kept_decisions(previous, config)
    config, decisions = _resolve_auto(_auto_rules(tokenizer_size, world_size, machine), config, kept)
    check_architecture(config.model)
    enforce((vocabulary_fits,), config, tokenizer_size)
    batches = BatchSchedule.from_config(config.data, config.train)
    check_seq_lens(batches)
    enforce((context_is_long_enough,), config, batches)
    schedule.check(config.optim, config.train)
    enforce(machine.constraints, config)
    layout = build_layout(config, world_size)
    resolved = ResolvedRun(config, decisions, layout, batches)
    device_bytes, host_bytes = machine.device_bytes(config.train.device), machine.host_bytes()
    if device_bytes is not None:
        enforce((state_fits_device,), config, layout, resolved.memory.static_bytes, device_bytes)
    if host_bytes is not None:
        enforce((batch_fits_host,), config, layout, host_bytes)
    return resolved


def resolve_for_cluster(config: RunConfig, world_size: int) -> ResolvedRun:
    """Decide for GPUs that are not here. The data need not exist if `model.vocab_size` is set.

    Raises:
        UserError: settings that do not go together, or the size of the vocabulary is not known.
    """
    file, size = config.data.path / "tokenizer.json", config.model.vocab_size
    if size == AUTO:
        if not file.is_file():
            raise UserError(
                f"model.vocab_size=auto is the tokenizer's size, and data.path={config.data.path} holds no prepared "
                f"data: set model.vocab_size"
            )
        size = load_tokenizer(file).vocab_size
    return resolve_run(config, tokenizer_size=size, world_size=world_size, machine=GPU_CLUSTER)


def _auto_rules(tokenizer_size: int, world_size: int, machine: Machine) -> dict[str, Rule]:
    """The rule of each setting that may say `auto`, in the order of deciding: later rules read the settings before."""
    return {
        "data.tokenizer": lambda c: (str(c.data.path / "tokenizer.json"), "the one the data was made with"),
        "model.vocab_size": lambda c: (
            _round_up_vocabulary(tokenizer_size),
            f"the tokenizer's {tokenizer_size}, rounded up",
        ),
        "optim.warmup": lambda c: (
            min(c.train.steps // WARMUP_DIVISOR, MAX_WARMUP),
            f"a tenth of the run, {MAX_WARMUP:,} steps at most",
        ),
        "optim.decay": lambda c: (
            schedule.WSD_DECAY if c.optim.schedule == "wsd" else 1.0,
            f"the usual for {c.optim.schedule}",
        ),
        "parallel.replicate": partial(auto_layout.replicate_rule, world_size=world_size),
        "parallel.shard": partial(auto_layout.shard_rule, world_size=world_size),
        "parallel.zero": auto_layout.zero_rule,
        "parallel.sequence": auto_layout.sequence_rule,
        "parallel.stages_per_rank": auto_layout.stages_rule,
        "train.device": machine.device,
        "train.precision": machine.precision,
        "train.micro_batch_size": partial(auto_layout.micro_batch_rule, world_size=world_size),
        "train.compile": machine.compile,
        "train.attention": machine.attention,
    }


def _resolve_auto(
    rules: Mapping[str, Rule], config: RunConfig, kept: Mapping[str, object]
) -> tuple[RunConfig, tuple[Decision, ...]]:
    """Replace each `auto` by the decision `kept` for it, or else by its rule."""
    decisions: list[Decision] = []
    for key, rule in rules.items():
        tree = config.model_dump(mode="json")
        section, name = key.split(".")
        if tree[section][name] != AUTO:
            continue
        value, reason = (kept[key], "as the run began") if key in kept else rule(config)
        tree[section][name] = value
        config = validate(tree)
        decisions.append(Decision(key, value, reason))
    return config, tuple(decisions)


def _kept_decisions(previous: RunConfig, config: RunConfig) -> dict[str, object]:
    """The settings that a resumed run takes over where it says `auto`: those on which its numbers depend.

    The decay belongs to a schedule. A run that ends with another schedule than it began with has another decay.
    """
    rules = on_resume()
    kept = {key: value for key, value in flatten(previous).items() if rules[key] != "may"}
    if previous.optim.schedule != config.optim.schedule:
        del kept["optim.decay"]
    return kept


def _round_up_vocabulary(size: int) -> int:
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def vocabulary_fits(config: RunConfig, tokenizer_size: int) -> Violation | None:
    """The embedding has a row for every token."""
    if tokenizer_size <= config.model.vocab_size:
        return None
    return Violation(
        f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's vocabulary of {tokenizer_size} "
        f"({config.data.tokenizer})",
        f"set model.vocab_size={_round_up_vocabulary(tokenizer_size)} or auto",
    )


def context_is_long_enough(config: RunConfig, batches: BatchSchedule) -> Violation | None:
    """The model is meant for the longest sequences of the run."""
    longest = batches.longest_seq_len
    if longest <= config.model.max_seq_len:
        return None
    setting = "data.seq_len" if longest == config.data.seq_len else "data.seq_len_schedule: seq_len"
    return Violation(
        f"{setting}={longest} is longer than model.max_seq_len={config.model.max_seq_len}",
        "lower the first or raise the second",
    )
