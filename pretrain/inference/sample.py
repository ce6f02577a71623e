"""Text from a trained model: at the end of a run, and for `pretrain generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint import directory
from pretrain.checkpoint.load import load_checkpoint
from pretrain.config import RunConfig
from pretrain.config.saved import read_config
from pretrain.errors import UserError
from pretrain.inference.generate import generate
from pretrain.model.transformer import Transformer
from pretrain.setup.engine import DTYPES, build_model

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the tokenizer shows for bytes that do not make a character yet."""


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0


def continue_text(model: Transformer, tokenizer: Tokenizer, prompt: str, sampling: SamplingOptions) -> Iterator[str]:
    """What the model writes after `prompt`, in pieces that join to the whole; stops at the end of the document or of
    the context.

    An empty prompt starts after an end-of-text token, as a document would. Raises UserError, at once, for a prompt that
    `check_prompt` refuses.
    """
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    room = check_prompt("the prompt", len(prompt_ids), model.config.max_seq_len)
    tokens = generate(
        model,
        prompt_ids,
        max_new_tokens=min(sampling.max_new_tokens, room),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        eot_id=tokenizer.eot_id,
        n_ids=tokenizer.vocab_size,
    )
    return _pieces(tokens, tokenizer)


def check_prompt(name: str, n_tokens: int, max_seq_len: int) -> int:
    """How many tokens may follow a prompt of `n_tokens`. UserError, with the name of the prompt, where none may."""
    if n_tokens >= max_seq_len:
        raise UserError(
            f"{name} has {n_tokens} tokens, which leave no room for more in model.max_seq_len={max_seq_len}; "
            f"shorten it to {max_seq_len - 1} or fewer"
        )
    return max_seq_len - n_tokens


def _pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of the tokens, piece by piece; a character that is spelt by several tokens comes with the last of
    them."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    if ids:
        yield tokenizer.decode(ids)[len(shown) :]


def load_trained_run(
    run_dir: Path, device: torch.device, on_problem: Callable[[Path, list[str]], None]
) -> tuple[Transformer, Tokenizer, RunConfig, Path]:
    """The model of a run's newest whole checkpoint on `device`, its tokenizer and config, and the checkpoint.

    `on_problem` hears of each newer checkpoint that is passed over, as in `checkpoint.directory.latest_valid`.

    Raises:
        UserError: no run there, no checkpoint yet, or none that is whole.
    """
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml; `pretrain train` makes one")
    config = read_config(config_file)
    path = directory.latest_valid(run_dir / "checkpoints", on_problem)
    if path is None:
        raise UserError(
            f"{run_dir} has no checkpoint yet; the first comes after checkpoint.every={config.checkpoint.every} steps"
        )
    tokenizer = load_tokenizer(run_dir)
    return load_trained_model(path, config, device), tokenizer, config, path


def load_trained_model(path: Path, config: RunConfig, device: torch.device) -> Transformer:
    """The whole model of the checkpoint at `path` on `device`, in the numbers that it was trained in, whatever the
    layout was."""
    model = build_model(config.model, "sdpa", device)
    load_checkpoint(path, {"model": dict(model.named_parameters())})
    return model.to(DTYPES[config.train.precision]).eval()
