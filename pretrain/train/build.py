"""Settings -> a model inside an engine, in the order in which one would explain it."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from parallel.engine import LossSum, Microbatch
from parallel.engines.torch import TorchEngine
from pretrain.config import ModelConfig, RunConfig
from pretrain.model.init import initialise
from pretrain.model.transformer import Transformer
from pretrain.optim.build import build_optimizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(config: ModelConfig, attention: str, device: torch.device) -> Transformer:
    """A model on `device` without values: shapes first, memory second, numbers last (`initialise`, or a checkpoint)."""
    with torch.device("meta"):
        model = Transformer(config, attention)
    return model.to_empty(device=device)


def build_engine(config: RunConfig) -> TorchEngine:
    """The model of a resolved config with its initial weights, and its optimizer."""
    model = build_model(config.model, config.train.attention, torch.device(config.train.device))
    initialise(model, config.run.seed)
    if config.train.compile:
        model.compile_parts()
    return TorchEngine(
        model,
        partial(compute_loss, config=config),
        partial(build_optimizer, config=config.optim),
        dtype=DTYPES[config.train.precision],
        clip=config.optim.clip,
    )


def compute_loss(model: nn.Module, microbatch: Microbatch, *, config: RunConfig) -> LossSum:
    """Forward pass and loss over one microbatch."""
    assert isinstance(model, Transformer)
    mask = model.document_mask(microbatch.document_ids, microbatch.positions).to(microbatch.input_ids.device)
    return model.loss(microbatch.input_ids, microbatch.labels, mask, z_loss=config.train.z_loss)
