"""States of torch's random number generators as text, for the manifest.

The program uses neither Python's nor numpy's generators.
"""

from __future__ import annotations

import base64

import torch


def capture() -> dict[str, str]:
    """Return the base64 states of this process's generators: `cpu`, and `cuda` (the current device) if there is a
    GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore(states: dict[str, str]) -> None:
    """Set the generators of this process to captured states. Skips a device that is missing here or in `states`."""
    for device, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
