"""Build the model and the engine from resolved settings."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from parallel.engine import Engine, EngineOptions, Microbatch, MicrobatchLoss, ModelSpec
from parallel.engines.torch.build import build_engine as build_torch_engine
from parallel.layout import Layout
from parallel.torch_compat import allow_recompilations
from pretrain.config import ModelConfig, RunConfig
from pretrain.estimate.flops import pipeline_costs
from pretrain.model.init import init_shard
from pretrain.model.moe.router import N_SUMS
from pretrain.model.moe.rows import row_keys
from pretrain.model.spec import architecture_of
from pretrain.model.transformer import Transformer
from pretrain.optim.build import build_optimizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: ModelConfig, attention: str, device: torch.device) -> Transformer:
    """A model on `device` with uninitialized weights: write them with `init_weights`, or load a checkpoint."""
    with torch.device("meta"):
        model = _build(config, attention, range(config.n_layers))
    model = model.to_empty(device=device)
    model.reset_buffers()
    return model


def _build(config: ModelConfig, attention: str, layers: range) -> Transformer:
    """These layers as the architecture builds them, on the device of the `torch.device` context."""
    model = architecture_of(config).model
    assert issubclass(model, Transformer)
    return model(config, attention, layers)


def build_engine(config: RunConfig, layout: Layout = Layout(), rank: int = 0) -> Engine:  # noqa: B008
    """The engine of `rank` for a resolved config, with its initial weights."""
    if config.train.compile:
        # One graph of a block per sequence length, and one for evaluation.
        allow_recompilations(len(config.data.seq_len_schedule) + 2)
    return build_torch_engine(
        build_model_spec(config),
        build_engine_options(config),
        layout=layout,
        rank=rank,
        device=torch.device(config.train.device),
    )


def build_model_spec(config: RunConfig) -> ModelSpec:
    """What an engine needs to know of the model of a config."""
    model = config.model
    return ModelSpec(
        costs=pipeline_costs(model),
        d_model=model.d_model,
        build=partial(_build, model, config.train.attention),
        init_shard=partial(init_shard, config=model, seed=config.run.seed),
        forward_step=partial(forward_step, z_loss=config.train.z_loss, seed=config.run.seed),
        build_optimizer=partial(build_optimizer, config=config.optim, architecture=architecture_of(model)),
        routing_width=model.moe.n_experts + N_SUMS if model.moe.n_experts else 0,
    )


def build_engine_options(config: RunConfig) -> EngineOptions:
    """How an engine computes, from a config."""
    train = config.train
    return EngineOptions(
        dtype=DTYPES[train.precision],
        max_grad_norm=config.optim.max_grad_norm,
        compile=train.compile,
        recompute=train.recompute,
        recompute_every=train.recompute_every,
        recompute_keep=train.recompute_keep,
    )


def forward_step(
    model: nn.Module, received: Tensor | None, microbatch: Microbatch, *, z_loss: float, seed: int = 0
) -> Tensor | MicrobatchLoss:
    """Run a chunk of the model on a microbatch. Returns the activations for the next chunk; the last one, the loss."""
    assert isinstance(model, Transformer)
    x = microbatch.input_ids if received is None else received
    tokens = microbatch.local_tokens
    rows = microbatch.document_ids, microbatch.positions
    mask = (
        model.document_mask(*rows)
        if tokens is None
        else model.context_parallel_mask(*rows, tokens.ranges, tokens.full_rows)
    )
    if model.config.moe.n_experts and microbatch.row_ids is not None:
        mask = mask._replace(row_keys_B=row_keys(microbatch.row_ids, seed))
    mask = mask.to(x.device)
    return model.loss(x, microbatch.labels, mask, z_loss=z_loss) if model.is_last else model(x, mask)
