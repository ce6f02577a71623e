"""The state of torch's random number generators as text, for the manifest. Python's and numpy's generators are not used by the program."""

from __future__ import annotations

import base64

import torch


def capture() -> dict[str, str]:
    """State of this process's generators, in base64: `cpu`, and `cuda` (the current device) where there is one."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore(states: dict[str, str]) -> None:
    """Put the generators of this process into captured states. A device that is not here, or was not there then, is left as it is."""
    for device, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
