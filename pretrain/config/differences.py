"""Compare the settings of two configs. Imports no torch."""

from __future__ import annotations

import textwrap

from pretrain.config import RunConfig, flatten

SHOWN_CHARACTERS = 80
ABSENT = object()


def differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """{key: "key: 1 in the run, 2 now"} of the settings that differ."""
    flat_before, flat_now = flatten(before), flatten(now)

    def show(flat: dict[str, object], key: str) -> str:
        value = flat.get(key, ABSENT)
        return "not set" if value is ABSENT else textwrap.shorten(str(value), SHOWN_CHARACTERS, placeholder=" ...")

    return {
        key: f"{key}: {show(flat_before, key)} in the run, {show(flat_now, key)} now"
        for key in flat_before | flat_now
        if flat_before.get(key, ABSENT) != flat_now.get(key, ABSENT)
    }
