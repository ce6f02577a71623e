"""The typed tree of settings. A YAML file holds the differences from the defaults here; `key=value` words win over it.

Reads no environment, imports no torch: `pretrain --help` and editors read this file too.
The sentence under a field is its `--help`, its description in the JSON schema, and its documentation.
`auto` values are replaced once, with a reason, by `pretrain.setup.resolve`; nothing after that meets one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.fields import FieldInfo

from data_pipeline.settings import AUTO as AUTO
from data_pipeline.settings import MixtureConfig, OrAuto, PrepareConfig, Settings
from pretrain.config.model import ModelConfig as ModelConfig
from pretrain.config.model import RopeConfig as RopeConfig
from pretrain.config.parallel import ParallelConfig as ParallelConfig
from pretrain.config.resume import Ancestor as Ancestor
from pretrain.config.resume import MayChange, MayChangeAhead


class RunSettings(Settings):
    """Where a run lives and which random numbers it draws."""

    dir: Annotated[Path, MayChange()] = Path("runs/default")
    """Run directory: config.yaml, metrics.jsonl, events.jsonl, checkpoints/, report.html. An existing one is resumed."""

    seed: int = Field(default=1234, ge=-(2**63), lt=2**64)
    """Seed of the initial weights and of the data order."""

    init_from: str | None = None
    """Begin from a checkpoint of another run, which is only read: RUN (its newest) or RUN@STEP. RUN is a run
    directory, or the folder of one checkpoint. The model is that run's, and the tokenizer must be. With
    checkpoints of its own, a run resumes from those."""

    init_mode: Literal["weights", "full"] = "weights"
    """What `init_from` takes over. `weights`: the weights alone; steps, data and schedule begin anew. `full`:
    optimizer, data position and steps taken too: train.steps counts them as well, and the same settings give the
    losses that the other run would have had."""

    ancestry: tuple[Ancestor, ...] = ()
    """Written by the program: the checkpoint that the run began from, then the one that it began from itself, and so
    on."""


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

    window: Annotated[int | None, MayChange()] = Field(default=None, gt=0)
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

    lr: Annotated[float, MayChangeAhead()] = Field(default=3e-4, gt=0, le=1000)
    """Peak learning rate, reached after `warmup`."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = Field(default=1e-8, gt=0, le=1)
    """AdamW's epsilon."""

    weight_decay: float = Field(default=0.1, ge=0, le=1000)
    """Decoupled weight decay of the matrices; norms, biases and embeddings get none."""

    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """`muon`: Nesterov momentum."""

    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; none does not clip."""

    schedule: Annotated[Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"], MayChangeAhead()] = "cosine"
    """Shape of the learning rate after the warm-up. `inverse_sqrt`, `constant` and `wsd` before its decay do not
    depend on train.steps: such a run can be made longer later."""

    warmup: Annotated[OrAuto[Annotated[int, Field(ge=0)]], MayChangeAhead()] = AUTO
    """Steps of linear warm-up. `auto` is a tenth of the run, at most 2,000."""

    decay: Annotated[OrAuto[Annotated[float, Field(ge=0, le=1)]], MayChangeAhead()] = AUTO
    """`wsd`: length of the final decay, as a fraction of the run. `auto` is 0.2 (arXiv:2405.18392). Other schedules decay throughout."""

    decay_shape: Annotated[Literal["linear", "sqrt", "cosine"], MayChangeAhead()] = "linear"
    """`wsd`: shape of the final decay; `sqrt` is 1 - sqrt(progress)."""

    min_lr_ratio: Annotated[float, MayChangeAhead()] = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""


class TrainConfig(Settings):
    """How long, in what batches, in which numbers."""

    steps: Annotated[int, MayChangeAhead()] = Field(default=1000, gt=0)
    """Optimizer steps of the whole run. Another number on resume is accepted if no step already taken would have had
    another learning rate."""

    batch_size: Annotated[int, MayChange()] = Field(default=32, gt=0)
    """Sequences in a global batch. When it is another one on resume, the data goes on at the sequence where it stopped."""

    batch_ramp_steps: Annotated[int, MayChangeAhead()] = Field(default=0, ge=0)
    """Steps over which the batch grows linearly from `batch_ramp_start` to `batch_size`; 0 is no ramp."""

    batch_ramp_start: Annotated[int, MayChangeAhead()] = Field(default=1, gt=0)
    """Sequences in the first global batch of a ramp."""

    micro_batch_size: Annotated[OrAuto[Annotated[int, Field(gt=0)]], MayChange()] = AUTO
    """Sequences in one forward and backward pass; gradients accumulate over the global batch. Every pass has this size: what a batch, its
    ramp or validation lacks is filled up with sequences that count for nothing. `auto` is the largest divisor of `batch_size` that holds at
    most 16,384 tokens, and fills up at most 10% of the run's sequences in a batch ramp."""

    z_loss: float = Field(default=0.0, ge=0, le=10)
    """Weight of log(Z)^2 in the loss (arXiv:2204.02311, section 5); it keeps the logits from drifting."""

    device: Annotated[OrAuto[Literal["cpu", "cuda"]], MayChange()] = AUTO
    """`auto` is CUDA where there is a GPU."""

    precision: OrAuto[Literal["bf16", "fp32"]] = AUTO
    """Numbers of the forward and backward pass; weights and optimizer state are fp32 either way. `auto` is bf16 where the device
    multiplies it fast."""

    recompute: Annotated[Literal["none", "full", "selective"], MayChange()] = "none"
    """Activations that are computed again in the backward pass instead of kept: `full` keeps the inputs of blocks alone, `selective` also
    the results of what is dear to compute (`recompute_keep`)."""

    recompute_every: Annotated[int, MayChange()] = Field(default=1, gt=0)
    """Recompute only in every k-th block; 1 is all of them."""

    recompute_keep: Annotated[tuple[Literal["attention", "matmul", "collective"], ...], MayChange()] = (
        "attention",
        "matmul",
        "collective",
    )
    """`selective`: operators whose results are kept."""

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
    """Batches of `train.batch_size` sequences, shared out over the sources in proportion to their held-out text, but at least 8
    sequences of each; the same ones each time, fewer if the held-out documents hold fewer. In each validation a source takes
    at least one microbatch on every data rank: many sources make it longer."""


class CheckpointConfig(Settings):
    """What survives."""

    every: int = Field(default=250, gt=0)
    """Steps between checkpoints; the last step and a stopped run are always saved."""

    keep: int = Field(default=3, gt=0)
    """Newest checkpoints kept; older ones are deleted after the next was committed."""

    on_loss: Literal["stop", "go_back"] = "stop"
    """When a checkpoint that events.jsonl tells of is gone, or none is whole: stop and say so, or go back to the newest
    whole one, to step 0 if there is none. Going back sets damaged checkpoints and the old records aside. It does nothing
    where no checkpoint is lost."""


class LogConfig(Settings):
    """Who hears of the run, besides metrics.jsonl and events.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard event files to `tensorboard/` in the run directory."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: `offline` writes to the run directory for `wandb sync`."""

    wandb_project: str = "pretrain"
    """Weights & Biases project."""

    samples: tuple[str, ...] = ()
    """Prompts continued at the end of the run, shown in the report."""


class RunConfig(Settings):
    """Everything a run is made of. `run/config.yaml` holds it in full and reproduces the run."""

    run: RunSettings = RunSettings()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: Annotated[ParallelConfig, MayChange()] = ParallelConfig()
    eval: Annotated[EvalConfig, MayChange()] = EvalConfig()
    checkpoint: Annotated[CheckpointConfig, MayChange()] = CheckpointConfig()
    log: Annotated[LogConfig, MayChange()] = LogConfig()


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


OnResume = Literal["may", "ahead", "never"]
"""Whether a setting may differ on resume: `may` (MayChange), `ahead` (MayChangeAhead), or `never`."""


def on_resume() -> dict[str, OnResume]:
    """The class of every setting by its dotted key. A mark on a section holds for all that is in it; what prepares
    data may change."""

    def classify(model: type[Settings], prefix: str, inherited: bool) -> Iterator[tuple[str, OnResume]]:
        for name, field in model.model_fields.items():
            key = f"{prefix}{name}"
            may = inherited or prepares(key) or any(isinstance(mark, MayChange) for mark in field.metadata)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from classify(field.annotation, f"{key}.", may)
            elif may:
                yield key, "may"
            else:
                yield key, "ahead" if any(isinstance(mark, MayChangeAhead) for mark in field.metadata) else "never"

    return dict(classify(RunConfig, "", inherited=False))


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
