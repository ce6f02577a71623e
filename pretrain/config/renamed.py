"""Settings that have another name than in earlier versions: the old names still load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "data.growth": "data.seq_len_schedule",
    "optim.clip": "optim.max_grad_norm",
    "checkpoint.on_loss": "checkpoint.on_invalid",
}
"""Old name: new name, in the same section."""


def rename_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree of settings, from YAML or JSON, in which every setting has its name of today.

    Raises:
        ValueError: the tree sets one setting under both names.
    """
    renamed = dict(tree)
    for old, new in RENAMED.items():
        section, old_name = old.split(".")
        new_name = new.split(".")[1]
        settings = renamed.get(section)
        if not isinstance(settings, Mapping) or old_name not in settings:
            continue
        if new_name in settings:
            raise ValueError(f"{old} is the old name of {new}, and both are set; remove {old}")
        renamed[section] = {new_name if name == old_name else name: value for name, value in settings.items()}
    return renamed
