"""Start a run from a checkpoint of another run (`run.init_from`): find it, check that it fits, load it.

The other run, the parent, is only read, and may be training meanwhile. Once the new run has its own checkpoints, it no
longer needs the parent.
"""

from __future__ import annotations

from operator import attrgetter

from torch.distributed import ProcessGroup

from data_pipeline.errors import StorageError
from data_pipeline.reading.loader import Loader
from data_pipeline.tokenizing.tokenizer import Tokenizer
from parallel.engine import Engine
from pretrain.checkpoint import directory
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.object_collectives import on_rank_zero
from pretrain.checkpoint.verify import verify_on_all_ranks
from pretrain.config import RunConfig, flatten
from pretrain.config.model import WEIGHT_SETTINGS, ModelConfig
from pretrain.config.saved import split_init_from
from pretrain.errors import UserError
from pretrain.optim.schedule import learning_rate
from pretrain.setup.named_checkpoint import NamedCheckpoint, find_checkpoint


def pin_init_from(config: RunConfig, previous: RunConfig | None) -> RunConfig:
    """On resume, `run.init_from` without @STEP means the step recorded in config.yaml.

    Raises:
        UserError: `run.init_from` names the run directory itself.
    """
    named = config.run.init_from
    if named is not None and split_init_from(named)[0].resolve() == config.run.dir.resolve():
        raise UserError(
            f"run.init_from={named} is run.dir itself, which resumes without it; choose another run.dir for a run that "
            "starts from it"
        )
    if previous is None or previous.run.init_from is None:
        return config
    run, step = split_init_from(previous.run.init_from)
    pinned: dict[str, object] = {"init_from": previous.run.init_from, "ancestry": previous.run.ancestry}
    if named is None:
        pinned["init_mode"] = previous.run.init_mode
    else:
        run_now, step_now = split_init_from(named)
        if run_now.resolve() != run.resolve() or step_now not in (None, step):
            return config  # refused when the settings are compared
    return config.model_copy(update={"run": config.run.model_copy(update=pinned)})


def find_init_checkpoint(config: RunConfig) -> NamedCheckpoint:
    """Return the checkpoint that `run.init_from` names. Reads only its manifest.

    Raises:
        UserError: it does not exist, or the run started from another one.
    """
    assert config.run.init_from is not None
    named = f"run.init_from={config.run.init_from}"
    found = find_checkpoint(config.run.init_from, named)
    recorded = next(iter(config.run.ancestry), None)
    if recorded and recorded.generation != found.manifest.generation:
        raise UserError(
            f"{named} is another checkpoint now (generation {found.manifest.generation}) than the one that this run "
            f"started from ({recorded.generation}, in {recorded.run}); put that one back, or choose another run.dir "
            "and leave run.ancestry out"
        )
    return found


def check_init_checkpoint(parent: NamedCheckpoint, config: RunConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """Raise UserError if `config` cannot start from this checkpoint; the message names the differences and the way
    out."""
    named = f"run.init_from={parent.name}"
    theirs, ours = parent.config.model, config.model
    values = {name: (attrgetter(name)(theirs), attrgetter(name)(ours)) for name in WEIGHT_SETTINGS}
    differ = {name: pair for name, pair in values.items() if pair[0] != pair[1]}
    if differ:
        differences = "; ".join(
            f"model.{name} is {there} there and {here} here" for name, (there, here) in differ.items()
        )
        raise UserError(
            f"{named} has weights of another model: {differences}; leave these settings out, the model is then that "
            f"run's{_conversion(theirs, ours)}"
        )
    _check_tokenizer(parent, tokenizer, data, named)
    if config.run.init_mode == "full":
        _check_full(parent, config, data, named)


def _conversion(theirs: ModelConfig, ours: ModelConfig) -> str:
    """The command that makes such a model, as a clause; empty if there is none."""
    if ours.moe.n_experts and not theirs.moe.n_experts:
        return ", or let `pretrain convert upcycle` make its MLPs into experts first"
    if ours.n_kv_heads < theirs.n_kv_heads:
        return ", or let `pretrain convert gqa` average its key/value heads first"
    return ""


def _check_tokenizer(parent: NamedCheckpoint, tokenizer: Tokenizer, data: Loader, named: str) -> None:
    """Raise UserError if the parent used another tokenizer: the same ids must mean the same text."""
    if parent.manifest.dataset == data.fingerprint:
        return
    files = parent.tokenizer_files
    theirs = parent.manifest.tokenizer or next(iter(files), None)
    if theirs is None:
        raise UserError(
            f"{named}: its tokenizer is not at {' or '.join(map(str, parent.tokenizer_paths))}; put it there, so that "
            "it can be compared"
        )
    if theirs != tokenizer.fingerprint:
        remedy = f"prepare the data with data.tokenizer={files[theirs]}" if theirs in files else "use data made with it"
        raise UserError(
            f"{named} was trained with another tokenizer ({theirs}) than the one that made the data here "
            f"({tokenizer.fingerprint}); {remedy}"
        )


def _check_full(parent: NamedCheckpoint, config: RunConfig, data: Loader, named: str) -> None:
    """Raise UserError if `run.init_mode=full` cannot continue the parent: its steps, optimizer state and data."""
    manifest, full = parent.manifest, f"{named} with run.init_mode=full"
    if manifest.conversion is not None:
        raise UserError(
            f"{full} takes over the optimizer state, and a converted checkpoint has none; set run.init_mode=weights"
        )
    if config.train.steps <= manifest.step:
        raise UserError(
            f"{full} goes on at step {manifest.step + 1}, and train.steps={config.train.steps} counts from the first "
            f"step of that run: set train.steps to more than {manifest.step}, or run.init_mode=weights to begin at "
            "step 1"
        )
    if config.optim.kind != parent.config.optim.kind:
        raise UserError(
            f"{full} takes over the state of its optimizer, {parent.config.optim.kind}, and "
            f"optim.kind={config.optim.kind}: set optim.kind={parent.config.optim.kind}, or run.init_mode=weights"
        )
    if manifest.dataset != data.fingerprint:
        raise UserError(
            f"{full} reads on where that run stopped, but data.path={config.data.path} ({data.fingerprint}) is not "
            f"its data ({manifest.dataset}, {parent.config.data.path}); set data.path to that, or "
            "run.init_mode=weights to begin with other data"
        )
    if manifest.order != data.order_fingerprint(manifest.samples):
        raise UserError(
            f"{full} reads on where that run stopped, but its first {manifest.samples} sequences would have come in "
            f"another order: {_order_differs(parent.config, config)}; put that back, or set run.init_mode=weights"
        )


def _order_differs(theirs: RunConfig, ours: RunConfig) -> str:
    """Describe the differing settings that determine the order of the data."""
    keys: tuple[str, ...] = (
        "run.seed",
        "data.seq_len",
        "data.window",
        "data.packing",
        "data.seq_len_schedule",
        "data.mixture.",
    )
    data = theirs.data, ours.data
    starts = [stage.start for of in data for stage in of.seq_len_schedule] + [
        stage.start for of in data for stage in of.mixture.stages
    ]
    if any(str(start).endswith("%") for start in starts):  # shares of the run move with its length
        keys += ("train.steps", "train.batch_size")
    flat_theirs, flat_ours = flatten(theirs), flatten(ours)
    differ = [key for key in flat_theirs if key.startswith(keys) and flat_theirs[key] != flat_ours[key]]
    return "; ".join(f"{key} is {flat_theirs[key]} there and {flat_ours[key]} here" for key in differ)


def load_init_checkpoint(parent: NamedCheckpoint, engine: Engine, mode: str, group: ProcessGroup | None) -> None:
    """Verify the checkpoint and load it into the engine, on any layout. Every rank of `group` calls it.

    Args:
        parent: the checkpoint.
        engine: receives the tensors.
        mode: `weights` leaves the optimizer unchanged; `full` loads it too.
        group: all ranks; None is a single process.

    Raises:
        UserError: a file is damaged or missing.
    """
    problems = verify_on_all_ranks(parent.path, group)
    if problems:
        _refuse_if_deleted(parent, group)
        others = [step for step in directory.committed_steps(parent.path.parent) if step != parent.manifest.step]
        remedy = f"name another step ({', '.join(map(str, others))})" if others else "restore it"
        raise UserError(f"run.init_from={parent.name}: {problems[0]}; {remedy}")
    state = engine.state()
    try:
        load_checkpoint(parent.path, state if mode == "full" else {"model": state["model"]}, group)
    except (OSError, StorageError, UserError):
        _refuse_if_deleted(parent, group)
        raise
    engine.sync_compute_weights()


def _refuse_if_deleted(parent: NamedCheckpoint, group: ProcessGroup | None) -> None:
    """Raise UserError if the parent has deleted the checkpoint while it was read."""
    if on_rank_zero(group, lambda: not (parent.path / MANIFEST).exists()):
        raise UserError(
            f"run.init_from={parent.name}: {parent.path} was deleted while it was read; its run keeps "
            f"checkpoint.keep={parent.config.checkpoint.keep} only. Start again, or copy the checkpoint and name the "
            "copy"
        )


def add_ancestry(config: RunConfig, parent: NamedCheckpoint) -> RunConfig:
    """Return the config with the exact checkpoint that it starts from, followed by that checkpoint's ancestors."""
    ancestor = parent.as_ancestor(config.run.init_mode)
    run = config.run.model_copy(update={"init_from": parent.name, "ancestry": (ancestor, *parent.config.run.ancestry)})
    return config.model_copy(update={"run": run})


def describe_init_checkpoint(parent: NamedCheckpoint, config: RunConfig) -> str:
    """Return one sentence for people: what is taken from the checkpoint, and which model settings differ."""
    manifest = parent.manifest
    text = f"from the weights of {parent.name} (generation {manifest.generation})"
    if config.run.init_mode == "full":
        before = learning_rate(manifest.step, parent.config.train, parent.config.optim)
        after = learning_rate(manifest.step + 1, config.train, config.optim)
        text = (
            f"from {parent.name} (generation {manifest.generation}): weights, optimizer, and data from sequence "
            f"{manifest.samples} on; learning rate {before:.4g} at step {manifest.step} there, {after:.4g} at step "
            f"{manifest.step + 1} here"
        )
    theirs, ours = flatten(parent.config), flatten(config)
    changed = [key for key in ours if key.startswith("model.") and key != "model.preset" and ours[key] != theirs[key]]
    return text + "".join(f"; {key}={ours[key]}, there {theirs[key]}" for key in changed)
