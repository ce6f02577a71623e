"""Multi-head attention becomes grouped-query attention: the key/value heads of a group become their mean
(arXiv:2305.13245, section 2.1). The function changes unless the heads of each group were equal."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pretrain.checkpoint.streaming import LazyTensor, TensorReader
from pretrain.config import ModelConfig
from pretrain.config.loading import validate
from pretrain.convert.run import Conversion, Source
from pretrain.errors import UserError
from pretrain.setup.constraints import divisors, format_choices

PER_HEAD = ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias", "k_norm.weight")
"""Tensors of attention with the key/value heads one after the other, `k_norm` only with `qk_norm=full`."""


def group_queries(source: Source, n_kv_heads: int) -> Conversion:
    """Plan the conversion to fewer key/value heads; `write_run` carries it out.

    Raises:
        UserError: the new number is not below the old one, or does not divide it.
    """
    model, name = source.config.model, source.checkpoint.name
    fewer = divisors(model.n_kv_heads)[:-1]
    if not fewer:
        raise UserError(f"{name} has model.n_kv_heads=1, which cannot be fewer")
    if n_kv_heads not in fewer:
        why = "is not below" if n_kv_heads >= model.n_kv_heads else "does not divide"
        raise UserError(
            f"--n-kv-heads={n_kv_heads} {why} model.n_kv_heads={model.n_kv_heads} of {name}; "
            f"use {format_choices(fewer)}"
        )
    tree = source.config.model_dump(mode="json")
    tree["model"] |= {"n_kv_heads": n_kv_heads, "preset": None}
    description = (
        f"key/value heads of {name} (generation {source.checkpoint.manifest.generation}) averaged from "
        f"{model.n_kv_heads} to {n_kv_heads}"
    )
    tensors = {key: _tensor(source.tensors, key, model, n_kv_heads) for key in source.tensors.shapes}
    return Conversion("gqa", validate(tree), tensors, description)


def _tensor(reader: TensorReader, name: str, model: ModelConfig, n_kv_heads: int) -> LazyTensor:
    """The tensor of that name in the new model."""
    rows, *rest = reader.shapes[name]
    if not name.endswith(PER_HEAD) or rows != model.n_kv_heads * model.head_dim:
        return LazyTensor.of((rows, *rest), partial(reader.read, name))
    return LazyTensor.of(
        (n_kv_heads * model.head_dim, *rest), lambda: average_heads(reader.read(name), n_kv_heads, model.head_dim)
    )


def average_heads(rows: Tensor, n_kv_heads: int, head_dim: int) -> Tensor:
    """Average the key or value heads of each group.

    Args:
        rows: [old heads * head_dim, ...]. Neighbouring heads form a group, as the query heads that
            read them do.
        n_kv_heads: number of groups.
        head_dim: rows of a head.

    Returns:
        [n_kv_heads * head_dim, ...].
    """
    return rows.view(n_kv_heads, -1, head_dim, *rows.shape[1:]).mean(1).flatten(0, 1)
