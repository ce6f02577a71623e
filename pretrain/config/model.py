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
    "moe.n_experts",
    "moe.top_k",
    "moe.d_ff",
    "moe.n_shared_experts",
    "moe.shared_expert_gate",
    "moe.n_dense_layers",
    "moe.every_n_layers",
    "moe.score_function",
    "moe.softmax_after_top_k",
    "moe.normalize_top_k",
    "moe.routed_scaling_factor",
    "moe.n_groups",
    "moe.top_k_groups",
    "moe.expert_bias",
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


class MoeConfig(Settings):
    """A mixture of experts in place of the MLP of some layers. `model.architecture=moe` reads it."""

    n_experts: int = Field(default=0, ge=0)
    """Routed experts of a layer; 0 is a dense model."""

    top_k: int = Field(default=2, gt=0)
    """Experts that each token is sent to: 1 in Switch (arXiv:2101.03961), 2 in Mixtral (arXiv:2401.04088), 8 in models
    with many small experts."""

    d_ff: OrAuto[Annotated[int, Field(gt=0)]] = AUTO
    """Hidden width of one expert. `auto` is `model.d_ff`."""

    n_shared_experts: int = Field(default=0, ge=0)
    """Experts that every token visits (arXiv:2401.06066, section 3.2), computed as one MLP, n times as wide."""

    shared_expert_gate: bool = False
    """Scale the output of the shared experts by a learned sigmoid of the token, as in Qwen1.5-MoE."""

    n_dense_layers: int = Field(default=0, ge=0)
    """First layers that keep the dense MLP of `model.d_ff` (arXiv:2401.06066, section 5.1.2)."""

    every_n_layers: int = Field(default=1, gt=0)
    """Only every n-th layer has experts, the others the dense MLP; 1 is all of them, 2 is GShard (arXiv:2006.16668)."""

    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Turns the router's logits into scores. `sigmoid` is DeepSeek-V3 (arXiv:2412.19437, equation 15)."""

    softmax_after_top_k: bool = False
    """Take the softmax over the chosen experts only, instead of choosing after a softmax over all of them."""

    normalize_top_k: bool = True
    """Divide the scores of a token's chosen experts by their sum. Not applied with `top_k=1`, where it would be a
    constant without a gradient."""

    routed_scaling_factor: float = Field(default=1.0, gt=0, le=1000)
    """Factor of the scores of the chosen experts (DeepSeek-V3: 2.5)."""

    n_groups: int = Field(default=1, gt=0)
    """Groups of consecutive experts, for group-limited routing (arXiv:2405.04434, section 2.2.2)."""

    top_k_groups: int = Field(default=1, gt=0)
    """Groups that a token chooses its experts from. A group's score is its best expert's under `softmax` (DeepSeek-V2)
    and the sum of its two best under `sigmoid` (DeepSeek-V3)."""

    aux_loss: float = Field(default=0.01, ge=0, le=10)
    """Weight of the load-balancing loss of each layer with experts: n_experts * sum_i f_i P_i (arXiv:2101.03961,
    section 2.2), which is 1 at perfect balance. f_i is expert i's fraction of all assignments, P_i its mean score."""

    aux_loss_scope: Literal["global_batch", "sequence", "microbatch"] = "global_batch"
    """Tokens over which the load f_i is counted. `global_batch` (arXiv:2501.11873) is that of the step before, so its
    value does not depend on the layout or on accumulation; `sequence` balances each sequence by itself
    (arXiv:2412.19437, equation 17), `microbatch` each microbatch."""

    router_z_loss: float = Field(default=0.0, ge=0, le=10)
    """Weight of the mean squared log-sum-exp of the router's logits of each layer. ST-MoE uses 1e-3 (arXiv:2202.08906,
    equation 5)."""

    expert_bias: bool = False
    """Balance the load by a bias on the scores that only the choice of experts sees (arXiv:2408.15664)."""

    bias_update_rate: Annotated[float, MayChange()] = Field(default=1e-3, ge=0, le=1)
    """`expert_bias`: change of each bias after a step, up if the expert's load in the global batch was below the mean,
    else down. DeepSeek-V3 resumes with 0 for the end of its training (arXiv:2412.19437, section 4.2)."""

    input_jitter: float = Field(default=0.0, ge=0, lt=1)
    """Multiply what the router sees by uniform noise in [1 - jitter, 1 + jitter]. Switch uses 1e-2 (arXiv:2101.03961,
    section 2.4)."""

    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the hidden activations of the routed experts (arXiv:2101.03961, section 2.4: 0.4 for fine-tuning)."""

    capacity_factor: float | None = Field(default=None, gt=0)
    """Each expert takes at most capacity_factor * top_k / n_experts of the tokens of a sequence, rounded up, and drops
    the rest, which only the residual stream carries on. None drops nothing."""

    drop_policy: Literal["score", "position"] = "score"
    """Which assignments an expert keeps when they exceed its capacity: those with the highest scores, or the first ones
    of the sequence."""

    @property
    def shared_d_ff(self) -> int:
        """Hidden width of the shared experts together."""
        return self.n_shared_experts * self.d_ff

    def has_experts(self, layer: int) -> bool:
        """Whether that layer has experts. The others have a dense MLP."""
        return self.n_experts > 0 and layer >= self.n_dense_layers and (layer + 1) % self.every_n_layers == 0

    def unread_without(self, name: str) -> str:
        """The setting without which nobody reads the setting `name` of this section; empty if it is read."""
        if self.n_experts == 0 and name != "n_experts":
            return "model.moe.n_experts"
        needed = {
            "bias_update_rate": (self.expert_bias, "model.moe.expert_bias=true"),
            "drop_policy": (self.capacity_factor is not None, "model.moe.capacity_factor"),
            "aux_loss_scope": (self.aux_loss > 0, "model.moe.aux_loss above 0"),
            "normalize_top_k": (not self.softmax_after_top_k, "model.moe.softmax_after_top_k=false"),
        }
        is_set, setting = needed.get(name, (True, ""))
        return "" if is_set else setting

    @model_validator(mode="after")
    def _check(self) -> MoeConfig:
        if self.n_experts == 0:
            return self
        if self.top_k > self.n_experts:
            raise ValueError(
                f"model.moe.top_k={self.top_k} is more than model.moe.n_experts={self.n_experts}; "
                f"use at most {self.n_experts}"
            )
        self._check_groups()
        if self.score_function == "sigmoid" and self.softmax_after_top_k:
            raise ValueError(
                "model.moe.softmax_after_top_k=true needs model.moe.score_function=softmax, and it is sigmoid; "
                "change one"
            )
        if self.softmax_after_top_k and self.top_k == 1:
            raise ValueError(
                "model.moe.softmax_after_top_k=true with model.moe.top_k=1 weights every expert by 1, which teaches "
                "the router nothing; change one"
            )
        if self.capacity_factor is not None and self.capacity_factor < 1 / self.n_experts:
            raise ValueError(
                f"model.moe.capacity_factor={self.capacity_factor} is below 1 / model.moe.n_experts = "
                f"{1 / self.n_experts:.4g}: experts would drop nearly all that is sent to them; use 1 or more"
            )
        if self.shared_expert_gate and not self.n_shared_experts:
            raise ValueError(
                "model.moe.shared_expert_gate=true scales the shared experts, and model.moe.n_shared_experts=0; "
                "set it to 1 or more"
            )
        return self

    def _check_groups(self) -> None:
        if self.n_experts % self.n_groups:
            fits = ", ".join(str(g) for g in range(1, self.n_experts + 1) if self.n_experts % g == 0)
            raise ValueError(
                f"model.moe.n_groups={self.n_groups} does not divide model.moe.n_experts={self.n_experts}; try {fits}"
            )
        if self.top_k_groups > self.n_groups:
            raise ValueError(
                f"model.moe.top_k_groups={self.top_k_groups} is more than model.moe.n_groups={self.n_groups}; "
                f"use at most {self.n_groups}"
            )
        reachable = self.top_k_groups * (self.n_experts // self.n_groups)
        if self.top_k > reachable:
            raise ValueError(
                f"model.moe.top_k={self.top_k} is more than the {reachable} experts in "
                f"model.moe.top_k_groups={self.top_k_groups} of model.moe.n_groups={self.n_groups} groups; "
                f"raise top_k_groups or lower top_k"
            )
        if self.n_groups > 1 and self.score_function == "sigmoid" and self.n_experts == self.n_groups:
            fits = ", ".join(str(g) for g in range(1, self.n_experts) if self.n_experts % g == 0)
            raise ValueError(
                f"model.moe.n_groups={self.n_groups} leaves one expert a group, and the score of a group is the sum of "
                f"its two best; try {fits}"
            )


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

    qk_norm: bool | Literal["full"] = False
    """RMSNorm on queries and keys before RoPE: `true` on each head, as in Qwen3; `full` on all heads together, as in
    OLMoE (arXiv:2409.02060)."""

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

    moe: MoeConfig = MoeConfig()

    @model_validator(mode="after")
    def _check_experts(self) -> ModelConfig:
        if self.moe.d_ff == AUTO:
            object.__setattr__(self, "moe", self.moe.model_copy(update={"d_ff": self.d_ff}))
        moe = self.moe
        if self.architecture == "moe" and not moe.n_experts:
            raise ValueError(
                "model.architecture=moe has experts, and model.moe.n_experts=0; set it, such as model.moe.n_experts=8"
            )
        if self.architecture == "llama" and moe.n_experts:
            raise ValueError(
                f"model.moe.n_experts={moe.n_experts} needs model.architecture=moe, and it is llama; change one"
            )
        if moe.n_experts and not any(map(moe.has_experts, range(self.n_layers))):
            raise ValueError(
                f"no layer of model.n_layers={self.n_layers} has experts with model.moe.n_dense_layers="
                f"{moe.n_dense_layers} and model.moe.every_n_layers={moe.every_n_layers}; lower one of the two"
            )
        return self

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
