"""The typed tree of settings. A YAML file holds the differences from the defaults here; `key=value` words win over it.

Reads no environment, imports no torch: `pretrain --help` and editors read this file too.
The sentence under a field is its `--help`, its description in the JSON schema, and its documentation.
`auto` values are replaced once, with a reason, by `pretrain.train.resolve`; nothing after that meets one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from data_pipeline.settings import AUTO as AUTO
from data_pipeline.settings import MixtureConfig, OrAuto, PrepareConfig, Settings


class MayChange:
    """Marks a setting that may differ when a run is resumed: it changes no number of the run but by rounding, or it is one that runs change
    on purpose, which then goes on from there (a stage of the mixture, the batch size)."""


class RunSettings(Settings):
    """Where a run lives and which random numbers it draws."""

    dir: Annotated[Path, MayChange()] = Path("runs/default")
    """Run directory: config.yaml, metrics.jsonl, events.jsonl, checkpoints/, report.html. An existing one is resumed."""

    seed: int = 1234
    """Seed of the initial weights and of the data order."""


class RopeConfig(Settings):
    """Rotary position embedding (arXiv:2104.09864) and its extensions to longer contexts."""

    kind: Literal["default", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"] = "default"
    """How positions are scaled: `linear` is position interpolation (arXiv:2306.15595), `ntk` raises theta once, `dynamic_ntk` with
    the sequence length, `yarn` is arXiv:2309.00071, `llama3` the Llama 3.1 scaling (arXiv:2407.21783)."""

    theta: float = Field(default=10_000.0, gt=0)
    """Base of the frequencies."""

    factor: float = Field(default=1.0, ge=1)
    """Context extension factor: new length / original length. `default` ignores it."""

    original_max_seq_len: int = Field(default=8192, gt=0)
    """Context length of the model before the extension, in tokens (`dynamic_ntk`, `yarn`, `llama3`)."""

    low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: wavelengths longer than original_max_seq_len / low_freq_factor are divided by `factor`."""

    high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: wavelengths shorter than original_max_seq_len / high_freq_factor are kept."""

    beta_fast: float = Field(default=32.0, gt=0)
    """`yarn`: dimensions that turn more often than this over the original context are kept."""

    beta_slow: float = Field(default=1.0, gt=0)
    """`yarn`: dimensions that turn less often than this over the original context are interpolated."""

    @model_validator(mode="after")
    def _ramps_rise(self) -> RopeConfig:
        for high, low in (("high_freq_factor", "low_freq_factor"), ("beta_fast", "beta_slow")):
            above, below = getattr(self, high), getattr(self, low)
            if above <= below:
                raise ValueError(f"model.rope.{high}={above} must be greater than model.rope.{low}={below}; swap them or change one")
        return self


class ModelConfig(Settings):
    """A pre-norm decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU. Parameters carry Hugging Face names."""

    preset: str | None = None
    """A named shape from `configs/models`; every other key of this section overrides it."""

    vocab_size: OrAuto[int] = AUTO
    """Rows of the embedding. `auto` is the tokenizer's size, rounded up to a multiple of 64."""

    n_layers: int = Field(default=12, gt=0)
    """Decoder blocks."""

    d_model: int = Field(default=768, gt=0)
    """Width of the residual stream."""

    n_heads: int = Field(default=12, gt=0)
    """Query heads."""

    n_kv_heads: int = Field(default=12, gt=0)
    """Key/value heads (arXiv:2305.13245): equal to n_heads is multi-head, 1 is multi-query attention."""

    head_dim: OrAuto[int] = AUTO
    """Width of one head. `auto` is d_model / n_heads."""

    d_ff: int = Field(default=2048, gt=0)
    """Hidden width of the SwiGLU MLP (arXiv:2002.05202)."""

    max_seq_len: int = Field(default=8192, gt=0)
    """Longest context the model is meant for, in tokens."""

    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm (arXiv:1910.07467)."""

    qk_norm: bool = False
    """RMSNorm on the query and key heads before RoPE, as in Qwen3."""

    qkv_bias: bool = False
    """Biases on the query, key and value projections, as in Qwen2."""

    tie_embeddings: bool = False
    """The output projection is the embedding."""

    sliding_window: int | None = Field(default=None, gt=0)
    """Attend only to the last this many tokens, itself included; none means all."""

    document_mask: bool = True
    """Tokens attend only within their own document when several are packed into one sequence."""

    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream get it divided by sqrt(2 * n_layers)."""

    rope: RopeConfig = RopeConfig()

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.n_heads % self.n_kv_heads:
            fits = ", ".join(str(g) for g in range(1, self.n_heads + 1) if self.n_heads % g == 0)
            raise ValueError(f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads={self.n_kv_heads}; try {fits}")
        if self.head_dim == AUTO:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}; set model.head_dim or change one"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs, use an even width")
        if self.head_dim == 2 and self.rope.kind in ("ntk", "dynamic_ntk"):
            raise ValueError(f"model.head_dim=2 is a single pair, which model.rope.kind={self.rope.kind} cannot stretch; use at least 4")
        return self


class GrowthStage(Settings):
    """Longer sequences from some point of the run on."""

    start: str | int = Field(alias="from")
    """Where it begins: a share of the run such as `80%`, or a number of sequences of data.seq_len tokens; rounded up to a step."""

    seq_len: int = Field(gt=0)
    """Tokens in a sequence: a multiple of the stage before. A batch holds the same tokens, so fewer sequences."""


class DataConfig(PrepareConfig):
    """Where the text comes from, how it becomes tokens, and how tokens become sequences.

    What prepares the data may change when a run is resumed: a checkpoint knows its data by the fingerprint of the shards.
    """

    path: Annotated[Path, MayChange()] = Path("data/default")
    """Prepared data set: train/ and validation/ shards with their manifests, and the tokenizer."""

    seq_len: int = Field(default=2048, gt=0)
    """Tokens in a training sequence."""

    growth: Annotated[tuple[GrowthStage, ...], MayChange()] = ()
    """Longer sequences later in the run, over the same windows of text: the order of the tokens does not change with them."""

    window: int | None = Field(default=None, gt=0)
    """Tokens in a window, the unit in which text is shuffled: a multiple of the longest sequence. None is the longest of seq_len and
    growth; set it where growth may be decided on later."""

    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences: one after the other, cut where a sequence ends, or so that no document is cut that fits into one
    (arXiv:2404.10830), at the price of some padding."""

    mixture: Annotated[MixtureConfig, MayChange()] = MixtureConfig()

    on_damage: Annotated[Literal["stop", "skip"], MayChange()] = "stop"
    """When a part of a shard does not match its checksum: stop, or train on without the sequences that it touches and log each."""


class OptimConfig(Settings):
    """Optimizer and learning-rate schedule; every schedule is a pure function of the step."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw` for all, or `muon` for the matrices inside the blocks and AdamW for the rest."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate, reached after `warmup`."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of the matrices; norms, biases and embeddings get none."""

    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """`muon`: Nesterov momentum."""

    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; none does not clip."""

    schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warm-up."""

    warmup: OrAuto[Annotated[int, Field(ge=0)]] = AUTO
    """Steps of linear warm-up. `auto` is a tenth of the run, at most 2,000."""

    decay: OrAuto[float] = AUTO
    """`wsd`: length of the final decay, as a fraction of the run. `auto` is 0.2 (arXiv:2405.18392). Other schedules decay throughout."""

    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    """`wsd`: shape of the final decay; `sqrt` is 1 - sqrt(progress)."""

    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""


class TrainConfig(Settings):
    """How long, in what batches, in which numbers."""

    steps: int = Field(default=1000, gt=0)
    """Optimizer steps of the whole run."""

    batch_size: Annotated[int, MayChange()] = Field(default=32, gt=0)
    """Sequences in a global batch. When it is another one on resume, the data goes on at the sequence where it stopped."""

    batch_ramp_steps: int = Field(default=0, ge=0)
    """Steps over which the batch grows linearly from `batch_ramp_start` to `batch_size`; 0 is no ramp."""

    batch_ramp_start: int = Field(default=1, gt=0)
    """Sequences in the first global batch of a ramp."""

    micro_batch_size: Annotated[OrAuto[int], MayChange()] = AUTO
    """Sequences in one forward and backward pass; gradients accumulate over the global batch. `auto` is the largest divisor of
    `batch_size` that holds at most 16,384 tokens."""

    z_loss: float = Field(default=0.0, ge=0)
    """Weight of log(Z)^2 in the loss (arXiv:2204.02311, section 5); it keeps the logits from drifting."""

    device: Annotated[OrAuto[Literal["cpu", "cuda"]], MayChange()] = AUTO
    """`auto` is CUDA where there is a GPU."""

    precision: OrAuto[Literal["bf16", "fp32"]] = AUTO
    """Numbers of the forward and backward pass; weights and optimizer state are fp32 either way. `auto` is bf16 where the device
    multiplies it fast."""

    compile: Annotated[OrAuto[bool], MayChange()] = AUTO
    """torch.compile of every block and the loss. `auto` is on for CUDA, and on a CPU for runs long enough to repay it, if there is
    a C++ compiler."""

    attention: Annotated[OrAuto[Literal["sdpa", "blocked", "varlen", "flash_attn"]], MayChange()] = AUTO
    """Attention kernels: PyTorch's SDPA (everywhere), `blocked` matrix products (fastest on a compiled CPU), PyTorch's variable-length
    flash kernels, or the flash-attn package (both CUDA). `auto` takes the fastest that is there."""


class EvalConfig(Settings):
    """Validation on held-out documents, in the loop."""

    every: int = Field(default=250, gt=0)
    """Steps between validations; the first is before step 1, the last after the last step."""

    batches: int = Field(default=20, gt=0)
    """Batches of `train.batch_size` sequences; the same ones each time, fewer if the held-out documents hold fewer."""


class CheckpointConfig(Settings):
    """What survives."""

    every: Annotated[int, MayChange()] = Field(default=250, gt=0)
    """Steps between checkpoints; the last step and a stopped run are always saved."""

    keep: Annotated[int, MayChange()] = Field(default=3, gt=0)
    """Newest checkpoints kept; older ones are deleted after the next was committed."""


class LogConfig(Settings):
    """Who hears of the run, besides metrics.jsonl and events.jsonl."""

    tensorboard: Annotated[bool, MayChange()] = False
    """Write TensorBoard event files to `tensorboard/` in the run directory."""

    wandb: Annotated[Literal["off", "offline", "online"], MayChange()] = "off"
    """Weights & Biases: `offline` writes to the run directory for `wandb sync`."""

    wandb_project: Annotated[str, MayChange()] = "pretrain"
    """Weights & Biases project."""

    samples: Annotated[tuple[str, ...], MayChange()] = ()
    """Prompts continued at the end of the run, shown in the report."""


class RunConfig(Settings):
    """Everything a run is made of. `run/config.yaml` holds it in full and reproduces the run."""

    run: RunSettings = RunSettings()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


def walk(model: type[Settings] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of the tree with its dotted key, in the order of this file."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from walk(field.annotation, f"{key}.")
        else:
            yield key, field


def prepares(key: str) -> bool:
    """Whether a setting is read when data is prepared, and in training only to find its tokenizer."""
    section, _, name = key.partition(".")
    return section == "data" and name.split(".")[0] in PrepareConfig.model_fields


def may_change() -> set[str]:
    """Dotted keys of the settings that may differ when a run is resumed: those marked, all in a section that is, and what prepares data."""

    def marked(model: type[Settings], prefix: str, inherited: bool) -> Iterator[str]:
        for name, field in model.model_fields.items():
            key = f"{prefix}{name}"
            may = inherited or prepares(key) or any(isinstance(mark, MayChange) for mark in field.metadata)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from marked(field.annotation, f"{key}.", may)
            elif may:
                yield key

    return set(marked(RunConfig, "", inherited=False))


def flatten(settings: Settings) -> dict[str, object]:
    """{"model.n_layers": 12, ...}: every setting by its dotted key, as plain YAML values."""
    tree = settings.model_dump(mode="json")
    flat: dict[str, object] = {}
    for key, _ in walk(type(settings)):
        node: object = tree
        for part in key.split("."):
            assert isinstance(node, dict)
            node = node[part]
        flat[key] = node
    return flat
