"""Check changes of schedule settings on resume. They are allowed if every step already taken would have had the same
learning rate, batch size and sequence length. (`restore` compares the data read so far, by the order fingerprint.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pretrain.config import RunConfig, differences, on_resume
from pretrain.errors import UserError
from pretrain.optim.schedule import batch_size_at, learning_rate, wsd_decay_steps
from pretrain.setup.batch_schedule import BatchSchedule, SeqLenStage


def check_schedule(run: Path, before: RunConfig, now: RunConfig, taken: int, samples: int, kept: Sequence[int]) -> None:
    """Refuse a schedule that differs for steps already taken.

    Args:
        run: the run directory.
        before: settings of the checkpoint.
        now: settings to resume with.
        taken: steps of the checkpoint.
        samples: sequences of data.seq_len tokens that these steps read.
        kept: steps of the checkpoints in the run directory.

    Raises:
        UserError: names the first step that differs, its old and new value, the reason, and the ways out.
    """
    if now.train.steps < taken:
        raise UserError(
            f"train.steps={now.train.steps} is below the {taken} steps that run.dir={run} has already taken: set "
            f"{taken} or more, or begin another run.dir from an earlier checkpoint (run.init_from={run}@STEP "
            "run.init_mode=full)"
        )
    rules = on_resume()
    changed = {key: line for key, line in differences(before, now).items() if rules[key] == "ahead"}
    inherited = next((a.step for a in before.run.ancestry[:1] if a.mode == "full"), 0)  # taken by the run it began from
    found = _first_difference(before, now, range(inherited + 1, taken + 1), changed) if changed else None
    if found is not None:
        step, had, would_have, reason = found
        earlier = max((other for other in kept if other < step), default=None)
        branch = ""
        if earlier is not None:
            branch = f", or before that step with run.init_from={run}@{earlier} run.init_mode=full"
        raise UserError(
            f"{'; '.join(changed.values())}: of the {taken} steps that run.dir={run} has taken, step {step} had {had} "
            f"and would have had {would_have}{reason}. Put the old value back; or begin another run.dir from these "
            f"weights with run.init_from={run}{branch}"
        )
    _check_stages(before, now, samples)


def _first_difference(
    before: RunConfig, now: RunConfig, taken: range, changed: Iterable[str]
) -> tuple[int, str, str, str] | None:
    """Return (step, old value, new value, reason) for the first of these steps that differs; None if none does."""
    if _ramp(before) != _ramp(now):  # without a change of the ramp, train.batch_size may change
        for step in taken:
            batches = batch_size_at(step, before.train), batch_size_at(step, now.train)
            if batches[0] != batches[1]:
                return step, f"a batch of {batches[0]} sequences", f"one of {batches[1]}", ""
    rates = _rates(before), _rates(now)
    for step in taken:
        had, would_have = rates[0](step), rates[1](step)
        if had != would_have:
            digits = ".6g" if f"{had:.6g}" != f"{would_have:.6g}" else ".17g"
            return (
                step,
                f"the learning rate {had:{digits}}",
                f"{would_have:{digits}}",
                _reason(before, now, step, changed),
            )
    return None


def _ramp(config: RunConfig) -> tuple[int, int]:
    return config.train.batch_ramp_steps, config.train.batch_ramp_start


def _rates(config: RunConfig) -> Callable[[int], float]:
    """Return the learning rate as a function of the step."""
    return lambda step: learning_rate(step, config.train, config.optim)


def _reason(before: RunConfig, now: RunConfig, step: int, changed: Iterable[str]) -> str:
    """Name the `changed` settings that change the learning rate of `step` on their own; explain it for train.steps."""
    rate, changed = _rates(before)(step), [key for key in changed if key.startswith(("optim.", "train."))]
    causes = [key for key in changed if _rates(_with_setting(before, now, key))(step) != rate]
    if "train.steps" not in causes:
        return f" (because of {' and '.join(causes)})" if causes else ""
    optim, steps = before.optim, before.train.steps
    if optim.schedule in ("cosine", "linear"):
        return f" (optim.schedule={optim.schedule} falls over all of train.steps={steps})"
    if optim.schedule == "wsd" and (length := wsd_decay_steps(steps, optim)):
        return f" (the decay of optim.schedule=wsd began at step {steps - length + 1} of {steps})"
    return ""


def _with_setting(before: RunConfig, now: RunConfig, key: str) -> RunConfig:
    """Return `before` with the value that `section.name` has in `now`."""
    section, name = key.split(".")
    changed = getattr(before, section).model_copy(update={name: getattr(getattr(now, section), name)})
    return before.model_copy(update={section: changed})


def _check_stages(before: RunConfig, now: RunConfig, samples: int) -> None:
    """Raise UserError if a stage of data.seq_len_schedule that has begun would change."""
    begun, would_have = (
        BatchSchedule.from_config(config.data, config.train).stages_before(samples) for config in (before, now)
    )
    if begun == would_have:
        return

    def describe(stages: list[SeqLenStage]) -> str:
        return ", ".join(f"{stage.seq_len} tokens from sequence {stage.first_sample} on" for stage in stages)

    raise UserError(
        f"data.seq_len_schedule: the {samples} sequences read so far had {describe(begun)}, and would have had "
        f"{describe(would_have)}; a share of the run such as 80% moves with train.steps and train.batch_size: write "
        "the stages that have begun as numbers of sequences of data.seq_len tokens, "
        f"{', '.join(f'from: {stage.first_sample}' for stage in begun[1:]) or 'and start new ones later'}"
    )
