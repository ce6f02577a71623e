"""Read the `config.yaml` of a run directory."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from data_pipeline.errors import unreadable_error
from pretrain.config import RunConfig
from pretrain.errors import UserError

LAST_SECTION = "log"
"""A `config.yaml` always holds all sections in the same order. Without this one, the file was cut short."""


def read_config(path: Path) -> RunConfig:
    """Read a `config.yaml`.

    Raises:
        UserError: it is missing, cut short or holds no settings.
        StorageError: it cannot be read now.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and "run" in tree and LAST_SECTION not in tree:
            raise UserError(
                f"{path} is cut short: it ends before its last section, {LAST_SECTION}. Restore it (the manifest.json of "
                "each checkpoint holds the same settings under `config`), or choose another run.dir"
            )
        return RunConfig.model_validate(tree)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run directory: it holds no {path.name}") from None
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise UserError(
            f"{path} cannot be read as the settings of a run ({reason}); restore it, or choose another run.dir"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML; restore it, or choose another run.dir") from error
    except OSError as error:
        raise unreadable_error(path, error, "read") from error
