"""Settings of the model: the `model` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import AUTO, OrAuto, Settings
from pretrain.config.resume import MayChange

WEIGHT_SETTINGS = (
    "architecture",
    "vocab_size",
    "n_layers",
    "d_model",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "qk_norm",
    "qkv_bias",
    "tie_embeddings",
)
"""Settings that decide the shapes and the meaning of the weights. A run that begins from another run's weights
(run.init_from) must have the same values. The others, such as `rope` and `max_seq_len`, may differ: longer contexts are
trained that way."""


class RopeConfig(Settings):
    """Rotary position embedding (arXiv:2104.09864) and its extensions to longer contexts."""

    kind: Literal["default", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"] = "default"
    """How positions are scaled: `linear` is position interpolation (arXiv:2306.15595), `ntk` raises theta once,
    `dynamic_ntk` with the sequence length, `yarn` is arXiv:2309.00071, `llama3` the Llama 3.1 scaling
    (arXiv:2407.21783)."""

    theta: float = Field(default=10_000.0, gt=1, le=1e12)
    """Base of the frequencies."""

    factor: float = Field(default=1.0, ge=1, le=1e6)
    """Context extension factor: new length / original length. `default` ignores it."""

    original_max_seq_len: int = Field(default=8192, gt=0)
    """Context length of the model before the extension, in tokens (`dynamic_ntk`, `yarn`, `llama3`)."""

    low_freq_factor: float = Field(default=1.0, gt=0, le=1e6)
    """`llama3`: wavelengths longer than original_max_seq_len / low_freq_factor are divided by `factor`."""

    high_freq_factor: float = Field(default=4.0, gt=0, le=1e6)
    """`llama3`: wavelengths shorter than original_max_seq_len / high_freq_factor are kept."""

    beta_fast: float = Field(default=32.0, gt=0, le=1e6)
    """`yarn`: dimensions that turn more often than this over the original context are kept."""

    beta_slow: float = Field(default=1.0, gt=0, le=1e6)
    """`yarn`: dimensions that turn less often than this over the original context are interpolated."""

    @model_validator(mode="after")
    def _check_ranges(self) -> RopeConfig:
        for high, low in (("high_freq_factor", "low_freq_factor"), ("beta_fast", "beta_slow")):
            above, below = getattr(self, high), getattr(self, low)
            if above <= below:
                raise ValueError(
                    f"model.rope.{high}={above} must be greater than model.rope.{low}={below}; swap them or change one"
                )
        return self


class ModelConfig(Settings):
    """A pre-norm decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU. Parameters carry Hugging Face names."""

    preset: Annotated[str | None, MayChange()] = None
    """A named shape from `configs/models`; every other key of this section overrides it."""

    architecture: str = "llama"
    """How layers are built: a file of `pretrain/model/architectures`, or a module of your own that Python can import,
    which defines `SPEC` (docs/extend/architecture.md)."""

    vocab_size: OrAuto[Annotated[int, Field(gt=0)]] = AUTO
    """Rows of the embedding. `auto` is the tokenizer's size, rounded up to a multiple of 64."""

    n_layers: int = Field(default=12, gt=0)
    """Decoder blocks."""

    d_model: int = Field(default=768, gt=0)
    """Width of the residual stream."""

    n_heads: int = Field(default=12, gt=0)
    """Query heads."""

    n_kv_heads: int = Field(default=12, gt=0)
    """Key/value heads (arXiv:2305.13245): equal to n_heads is multi-head, 1 is multi-query attention."""

    head_dim: OrAuto[Annotated[int, Field(gt=0)]] = AUTO
    """Width of one head. `auto` is d_model / n_heads."""

    d_ff: int = Field(default=2048, gt=0)
    """Hidden width of the SwiGLU MLP (arXiv:2002.05202)."""

    max_seq_len: Annotated[int, MayChange()] = Field(default=8192, gt=0)
    """Longest context the model is meant for, in tokens."""

    norm_eps: float = Field(default=1e-5, gt=0, le=1)
    """Epsilon of every RMSNorm (arXiv:1910.07467)."""

    qk_norm: bool = False
    """RMSNorm on the query and key heads before RoPE, as in Qwen3."""

    qkv_bias: bool = False
    """Biases on the query, key and value projections, as in Qwen2."""

    tie_embeddings: bool = False
    """The output projection is the embedding."""

    sliding_window: int | None = Field(default=None, gt=0)
    """Tokens attend only to the last `sliding_window` tokens, themselves included; none means all."""

    document_mask: bool = True
    """Tokens attend only within their own document when several are packed into one sequence."""

    init_std: float = Field(default=0.02, gt=0, le=100)
    """Standard deviation of the initial weights. That of projections into the residual stream is divided by
    sqrt(2 * n_layers)."""

    rope: RopeConfig = RopeConfig()

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.n_heads % self.n_kv_heads:
            fits = ", ".join(str(g) for g in range(1, self.n_heads + 1) if self.n_heads % g == 0)
            raise ValueError(
                f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads={self.n_kv_heads}; try {fits}"
            )
        if self.head_dim == AUTO:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}; "
                    "set model.head_dim or change one"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs, use an even width")
        if self.head_dim == 2 and self.rope.kind in ("ntk", "dynamic_ntk"):
            raise ValueError(
                f"model.head_dim=2 is a single pair, which model.rope.kind={self.rope.kind} cannot stretch; "
                "use at least 4"
            )
        return self
