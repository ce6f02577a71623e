"""The directory of one run: its paths, its settings on disk, and the lock that excludes a second process.

A directory belongs to one configuration. Opening it with other settings is refused, except for settings that change no
result of the run (`MayChange` in `pretrain.config.resume`), and settings of the schedule (`MayChangeAhead`), which
`pretrain.train.resume` compares once it knows how many steps were taken.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from data_pipeline.atomic import write_atomic
from data_pipeline.locks import FileLock, LockHeldError
from data_pipeline.tokenizing.tokenizer import load_tokenizer
from pretrain.config import RunConfig, differences, on_resume
from pretrain.config.saved import CONFIG_FILE, dump, read_config
from pretrain.errors import UserError
from pretrain.runs.jsonl import RecordFile, read_events
from pretrain.runs.schema import Event

SHOWN_DIFFERENCES = 5
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """An open run directory, locked for the one process that writes.

    Close it, or use it as a context, to release it.
    """

    path: Path
    attempt: int
    """1 for the first start, plus one for each start or resume in `events.jsonl`."""
    lock: FileLock | None
    """None on worker ranks, which write no records."""
    changes: tuple[str, ...]
    """Settings that differ from those on disk, one sentence each. Changes that are not allowed were already refused."""

    @classmethod
    def open(cls, config: RunConfig) -> RunDirectory:
        """Create `config.run.dir`, or open it again with the same settings.

        Args:
            config: complete, without `auto`. It is only compared: `write_config` writes it after all validation has
                passed.

        Raises:
            UserError: the directory cannot be created, is in use, or belongs to a run with other settings. Nothing in
                it was changed.
        """
        path = config.run.dir
        lock = _lock(path)
        try:
            changes = _changes(path, config)
            starts = sum(event.kind in {"start", "resume"} for event in read_events(path / "events.jsonl"))
        except OSError as error:
            lock.release()
            raise _unusable(path, error) from error
        except Exception:
            lock.release()
            raise
        return cls(path, starts + 1, lock, changes)

    @classmethod
    def for_worker_rank(cls, config: RunConfig) -> RunDirectory:
        """Return the directory for a rank other than 0: it writes its part of checkpoints, and its records are
        discarded."""
        return cls(config.run.dir, attempt=0, lock=None, changes=())

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml of a new run. For an existing run, write it and an event if settings changed."""
        file = self.path / CONFIG_FILE
        try:
            if self.changes:
                with RecordFile(self.events) as events:
                    events.append(Event(time=time.time(), kind="settings", text="; ".join(self.changes)))
            if self.changes or not file.exists():
                write_atomic(file, dump(config).encode())
        except OSError as error:
            raise _unusable(self.path, error) from error

    @property
    def metrics(self) -> Path:
        """Path of the records of steps and validations."""
        return self._record_file("metrics.jsonl")

    @property
    def events(self) -> Path:
        """Path of the events."""
        return self._record_file("events.jsonl")

    @property
    def checkpoints(self) -> Path:
        """Parent of the `step-...` directories."""
        return self.path / "checkpoints"

    def _record_file(self, name: str) -> Path:
        return Path(os.devnull) if self.lock is None else self.path / name

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def save_tokenizer(source: Path, run_dir: Path) -> None:
    """Copy the run's tokenizer into its directory if none is there: the directory can then be moved anywhere."""
    target = run_dir / "tokenizer.json"
    if not target.exists():
        write_atomic(target, load_tokenizer(source).to_json().encode())


def _lock(path: Path) -> FileLock:
    """Make the directory if it is missing, and lock it for this process."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FileLock.acquire(path / LOCK_FILE, blocking=False)
    except LockHeldError as error:
        raise UserError(
            f"run.dir={path} is in use by process {error.holder}; wait for it or stop it, or choose another run.dir"
        ) from None
    except OSError as error:  # no permission, a file system without locks, a full disk
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(f"run.dir={path}: {error.strerror}; choose a directory that can be written")


def _changes(path: Path, config: RunConfig) -> tuple[str, ...]:
    """Describe how the settings differ from those on disk. UserError if a difference is not allowed."""
    file = path / CONFIG_FILE
    if not file.exists():
        left_over = [name for name in ("metrics.jsonl", "events.jsonl", "checkpoints") if (path / name).exists()]
        if left_over:
            raise UserError(
                f"run.dir={path} holds {left_over[0]} but no config.yaml, so its settings are unknown; choose another "
                "run.dir"
            )
        return ()
    lines, rules = differences(read_config(file), config), on_resume()
    refused = [line for key, line in lines.items() if rules[key] == "never"]
    if refused:
        own_weights = all(rules[key] != "never" or not key.startswith(("model.", "run.")) for key in lines)
        raise UserError(_other_run(path, refused, own_weights=own_weights))
    return tuple(lines.values())


def _other_run(path: Path, refused: list[str], *, own_weights: bool) -> str:
    shown = "; ".join(refused[:SHOWN_DIFFERENCES])
    more = f"; and {len(refused) - SHOWN_DIFFERENCES} more" if len(refused) > SHOWN_DIFFERENCES else ""
    remedy = f" (to start from the weights of this one: run.init_from={path})" if own_weights else ""
    return (
        f"run.dir={path} holds a run with other settings: {shown}{more}; put the values back, or choose another "
        f"run.dir{remedy}"
    )
