"""Text from a trained model: at the end of a run, and for `pretrain generate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint import directory, store
from pretrain.config import RunConfig
from pretrain.config_loading import load as load_config
from pretrain.errors import UserError
from pretrain.model.generate import generate
from pretrain.model.init import initialise
from pretrain.model.transformer import Transformer
from pretrain.train.build import DTYPES, build_model

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the tokenizer shows for bytes that do not make a character yet."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0


def continue_text(model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """What the model writes after `prompt`, in pieces that join to the whole; stops at the end of the document.

    An empty prompt starts after an end-of-text token, as a document would.
    """
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    ids: list[int] = []
    shown = ""
    stream = generate(
        model,
        prompt_ids,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        eot_id=tokenizer.eot_id,
    )
    for token in stream:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    if ids:
        yield tokenizer.decode(ids)[len(shown) :]


def open_trained(run_dir: Path, device: torch.device) -> tuple[Transformer, Tokenizer, RunConfig, Path]:
    """The model of a run's newest whole checkpoint on `device`, its tokenizer and config, and the checkpoint.

    Raises:
        UserError: no run there, no checkpoint yet, or none that is whole.
    """
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml; `pretrain train` makes one")
    config = load_config(config_file).config
    path = directory.newest(run_dir / "checkpoints", on_problem=lambda _path, _problems: None)
    if path is None:
        raise UserError(f"{run_dir} has no checkpoint yet; the first comes after checkpoint.every={config.checkpoint.every} steps")
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = build_model(config.model, "sdpa", device)
    initialise(model, config.run.seed)  # for what is no parameter: the frequencies of RoPE
    store.load(path, {"model": dict(model.named_parameters())})
    return model.to(DTYPES[config.train.precision]).eval(), tokenizer, config, path
