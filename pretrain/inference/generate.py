"""Sampling text from a model, with a cache of keys and values.

Shape suffixes: S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pretrain.model.attention import continuation_mask
from pretrain.model.kv_cache import KVCache
from pretrain.model.transformer import Transformer


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eot_id: int | None = None,
    n_ids: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` token ids that continue the prompt, one at a time; stops before yielding `eot_id`.

    Draws only ids below `n_ids`: the rows that pad the vocabulary belong to no token.

    `temperature=0` is greedy. `top_k` keeps the k likeliest tokens, `top_p` the likeliest that together reach that
    probability (arXiv:1904.09751). Sampling has its own generator: the same seed gives the same text, on every device
    with the same logits. Raises ValueError for an empty prompt or one that does not fit into `model.max_seq_len`.
    """
    capacity = len(prompt_ids) + max_new_tokens
    if not prompt_ids:
        raise ValueError("the prompt is empty: start with the end-of-text token to generate from nothing")
    if capacity > model.config.max_seq_len:
        raise ValueError(
            f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens} exceed "
            f"model.max_seq_len={model.config.max_seq_len}; shorten one of them"
        )
    weight = model.output_weight
    cache = KVCache(model.config, 1, capacity, weight.device, weight.dtype)
    generator = torch.Generator("cpu").manual_seed(seed)
    pending = list(prompt_ids)
    for _ in range(max_new_tokens):
        logits_V = next_token_logits(model, pending, cache)[:n_ids]
        token = sample(logits_V, temperature, top_k, top_p, generator)
        if token == eot_id:
            return
        yield token
        pending = [token]


def next_token_logits(model: Transformer, token_ids: Sequence[int], cache: KVCache) -> Tensor:
    """Append tokens to the cache and return the fp32 logits [V] of the next token, on the CPU."""
    ids_1S = torch.tensor([token_ids], device=model.output_weight.device)
    mask = continuation_mask(cache.length, len(token_ids), cache.capacity, model.config, ids_1S.device)
    # Shapes grow by one token a call: compiled blocks would be compiled again and again.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model.logits(model(ids_1S, mask, cache)[0, -1]).float().cpu()


def sample(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Draw a token id from the logits, after temperature, then top-k, then top-p."""
    if temperature == 0:
        return int(logits_V.argmax())
    # Subtracting the maximum before dividing avoids an overflow at a small temperature.
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
    likeliest_V, ids_V = probabilities_V.sort(descending=True, stable=True)
    if top_k is not None:
        likeliest_V[top_k:] = 0
        likeliest_V /= likeliest_V.sum()
    if top_p is not None:
        before_V = likeliest_V.cumsum(0, dtype=torch.float64) - likeliest_V
        likeliest_V[1:] *= before_V[1:] < top_p  # the likeliest one always stays
    return int(ids_V[torch.multinomial(likeliest_V, 1, generator=generator)])
