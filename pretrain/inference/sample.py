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
from pretrain.config.saved import CONFIG_FILE, read_config
from pretrain.errors import UserError
from pretrain.inference.generate import generate
from pretrain.model.transformer import Transformer
from pretrain.setup.engine import DTYPES, build_model

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoded form of bytes that are not a complete character yet."""


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0


def continue_text(model: Transformer, tokenizer: Tokenizer, prompt: str, options: SamplingOptions) -> Iterator[str]:
    """Yield the model's continuation of `prompt` in pieces; stop at the end of the document or of the context.

    An empty prompt starts after an end-of-text token, as a document would.

    Raises:
        UserError: at once, if `check_prompt` refuses the prompt.
    """
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    room = check_prompt("the prompt", len(prompt_ids), model.config.max_seq_len)
    tokens = generate(
        model,
        prompt_ids,
        max_new_tokens=min(options.max_new_tokens, room),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        eot_id=tokenizer.eot_id,
        n_ids=tokenizer.vocab_size,
    )
    return _text_pieces(tokens, tokenizer)


def check_prompt(name: str, n_tokens: int, max_seq_len: int) -> int:
    """Return how many tokens may follow a prompt of `n_tokens`. UserError, naming the prompt, if none may."""
    if n_tokens >= max_seq_len:
        raise UserError(
            f"{name} has {n_tokens} tokens, which leave no room for more in model.max_seq_len={max_seq_len}; "
            f"shorten it to {max_seq_len - 1} or fewer"
        )
    return max_seq_len - n_tokens


def _text_pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of the tokens piece by piece; a character of several tokens comes with the last of them."""
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
    """Load the model of a run's latest valid checkpoint onto `device`.

    Args:
        run_dir: the run directory.
        device: of the model.
        on_problem: called for each newer checkpoint that is not valid, as in `checkpoint.directory.latest_valid`.

    Returns:
        The model, its tokenizer and config, and the path of the checkpoint.

    Raises:
        UserError: there is no run, no checkpoint yet, or no valid one.
    """
    config_file = run_dir / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml; `pretrain train` creates one")
    config = read_config(config_file)
    path = directory.latest_valid(run_dir / "checkpoints", on_problem)
    if path is None:
        raise UserError(
            f"{run_dir} has no checkpoint yet; the first comes after checkpoint.every={config.checkpoint.every} steps"
        )
    tokenizer = load_tokenizer(run_dir)
    return load_trained_model(path, config, device), tokenizer, config, path


def load_trained_model(path: Path, config: RunConfig, device: torch.device) -> Transformer:
    """Load the unsharded model of the checkpoint at `path` onto `device`, in the run's precision, whatever its
    layout.

    Its experts take every token: text is made token by token, and a token alone exceeds no capacity.
    """
    dropless = config.model.moe.model_copy(update={"capacity_factor": None})
    model = build_model(config.model.model_copy(update={"moe": dropless}), "sdpa", device)
    load_checkpoint(path, {"model": {**dict(model.named_parameters()), **model.saved_buffers}})
    for parameter in model.parameters():  # not the buffers: routers compute in fp32
        parameter.data = parameter.data.to(DTYPES[config.train.precision])
    return model.eval()
