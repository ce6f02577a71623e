"""The layouts that are compared with one process, and the small model that they train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.layout import Layout

BATCH_SIZE, SEQ_LEN, VOCAB_SIZE = 8, 64, 160
MAX_GRAD_NORM = 1.0

MODEL = (
    *("model.n_layers=4", "model.d_model=64", "model.n_heads=8", "model.n_kv_heads=4", "model.head_dim=8"),
    *("model.d_ff=96", f"model.vocab_size={VOCAB_SIZE}", "model.max_seq_len=64"),
    *("model.qk_norm=true", "model.qkv_bias=true"),
    *("train.device=cpu", "train.precision=fp32", "train.compile=false", "train.attention=sdpa"),
    *("optim.lr=1e-3", "optim.eps=1e-5", f"optim.max_grad_norm={MAX_GRAD_NORM}", "train.z_loss=1e-4"),
    *(f"data.seq_len={SEQ_LEN}", f"train.batch_size={BATCH_SIZE}"),
)
"""Settings of every case. AdamW's epsilon is Llama 2's 1e-5 (arXiv:2307.09288, section 2.2): with 1e-8 the first steps
divide rounding noise by itself wherever a gradient is smaller than it, and biases start at 0."""

DEEP = ("model.n_layers=8",)
UNEVEN = ("model.n_layers=5",)
TIED = ("model.tie_embeddings=true",)
ODD_SIZES = ("model.d_ff=97", "model.vocab_size=161", "model.n_layers=5")
FEW_HEADS = ("model.n_kv_heads=2",)
FULL_QK_NORM = ("model.qk_norm=full",)
SLIDING_WINDOW = ("model.sliding_window=20",)
LARGE = ("model.n_layers=1", "model.d_model=1024", "model.d_ff=10240")
"""Three tensors of 10,485,760 elements with dense gradients: fp32 sums of squares are too inexact for them."""
BF16 = ("train.precision=bf16",)
MUON = ("optim.kind=muon",)


MOE = ("model.architecture=moe", "model.moe.n_experts=8", "model.moe.d_ff=48")
"""8 experts, 2 of them for each token; auxiliary loss by the load of the global batch."""
BIAS = (*MOE, "model.moe.expert_bias=true", "model.moe.score_function=sigmoid", "model.moe.aux_loss=0")
SHARED = (*MOE, "model.moe.n_shared_experts=1", "model.moe.shared_expert_gate=true", "model.moe.n_dense_layers=1")
CAPACITY = (*MOE, "model.moe.capacity_factor=0.8", "model.moe.aux_loss_scope=sequence", "model.moe.router_z_loss=1e-3")
BY_POSITION = (*MOE, "model.moe.capacity_factor=1.1", "model.moe.drop_policy=position")
RANDOM = (*MOE, "model.moe.input_jitter=0.1", "model.moe.expert_dropout=0.2")
FINE_GRAINED = (*MOE, "model.moe.n_experts=16", "model.moe.top_k=4", "model.moe.n_groups=4", "model.moe.top_k_groups=2")
SWITCH = (*MOE, "model.moe.n_experts=32", "model.moe.top_k=1")
"""More experts than a rank has tokens, on 8 ranks."""

TOLERANCES = {
    "loss_error": 1e-5,
    "gradient_error": 1e-4,
    "norm_error": 1e-6,
    "parameter_error": 1e-5,
    "load_error": 0.0,
    "balance_error": 1e-5,
}
"""The load of experts is counted: it must be the same."""
BF16_TOLERANCES = {"loss_error": 2e-3, "norm_error": 2e-3}


@dataclass(frozen=True)
class Case:
    """One row of the table: a layout, and how the model and the training differ from `MODEL`."""

    layout: Layout
    settings: tuple[str, ...] = ()
    """Settings of both the layout and the single process."""
    layout_settings: tuple[str, ...] = ()
    """Settings of the layout only. They may change results by rounding: recomputation, kernels, compilation."""
    micro_batch: int = 2
    """Sequences in a microbatch of the layout. The single process takes the whole batch at once."""

    @property
    def name(self) -> str:
        """The layout and all in which the case differs from others."""
        layout = self.layout
        option_axes = {
            "zero": layout.shard,
            "schedule": layout.pipeline,
            "context_method": layout.context,
            "reshard_to": layout.reshard_to or 1,
        }
        options = [f"{option}={getattr(layout, option)}" for option, size in option_axes.items() if size > 1]
        options += [option for option in ("sequence", "replicate_kv") if getattr(layout, option)]
        if layout.stages_per_rank > 1:
            options.append(f"stages_per_rank={layout.stages_per_rank}")
        settings = [*self.settings, *self.layout_settings]
        if {*MOE} <= {*settings}:
            settings = ["moe", *(setting for setting in settings if setting not in MOE)]
        settings = [
            f"{key.rpartition('.')[2]}{sign}{value}" for key, sign, value in (s.partition("=") for s in settings)
        ]
        return " ".join([str(layout), *options, *settings, f"micro_batch={self.micro_batch}"])

    @property
    def tolerances(self) -> Mapping[str, float]:
        """The largest error of each kind. Muon orthogonalizes in bf16 whatever the precision is."""
        return BF16_TOLERANCES if {*BF16, *MUON} & {*self.settings} else TOLERANCES


def all_cases() -> list[Case]:
    """Return every kind of parallelism alone, in pairs and triples, and with recomputation, bf16 and Muon."""
    return [
        *data_parallel_cases(),
        *tensor_parallel_cases(),
        *pipeline_cases(),
        *context_parallel_cases(),
        *combined_cases(),
        *recompute_cases(),
        *bf16_cases(),
        *expert_cases(),
        *expert_recipe_cases(),
    ]


def data_parallel_cases() -> list[Case]:
    """Replication and ZeRO 1 to 3."""
    return [
        Case(Layout(replicate=2)),
        Case(Layout(replicate=4), micro_batch=1),
        *(Case(Layout(shard=n, zero=zero), micro_batch=1) for zero in (1, 2, 3) for n in (2, 4)),
        *(Case(Layout(replicate=2, shard=2, zero=zero), micro_batch=1) for zero in (1, 2, 3)),
        Case(Layout(shard=4, reshard_to=2), TIED),
        Case(Layout(shard=4, tensor=2, sequence=True, reshard_to=2), micro_batch=1),
        Case(Layout(shard=4), ODD_SIZES),
        Case(Layout(shard=8), micro_batch=1),
        Case(Layout(shard=2), LARGE, micro_batch=4),
    ]


def tensor_parallel_cases() -> list[Case]:
    """Tensor parallelism, without and with sequence parallelism."""
    return [
        *(Case(Layout(tensor=n)) for n in (2, 4)),
        *(Case(Layout(tensor=n, sequence=True), TIED if n == 4 else ()) for n in (2, 4)),
        Case(Layout(tensor=4, sequence=True, replicate_kv=True), FEW_HEADS),
        Case(Layout(shard=2, tensor=2), FULL_QK_NORM),
    ]


def pipeline_cases() -> list[Case]:
    """Every pipeline schedule."""
    simple = [
        Case(Layout(pipeline=n, schedule=schedule), UNEVEN if n == 2 else (), micro_batch=1)
        for schedule in ("gpipe", "1f1b")
        for n in (2, 4)
    ]
    interleaved = [
        Case(Layout(pipeline=n, schedule=schedule, stages_per_rank=2, zero=2), DEEP, micro_batch=1)
        for schedule in ("interleaved", "interleaved_zero_bubble", "zbv")
        for n in (2, 4)
    ]
    tied = [
        Case(Layout(pipeline=2, schedule=schedule, stages_per_rank=k, zero=2), TIED, micro_batch=1)
        for schedule, k in (("1f1b", 1), ("zbv", 2))
    ]
    return [*simple, *interleaved, *tied]


def context_parallel_cases() -> list[Case]:
    """Both methods of context parallelism."""
    methods = ("gather", "ulysses")
    return [
        *(Case(Layout(context=n, context_method=method)) for n in (2, 4) for method in methods),
        *(Case(Layout(context=2, context_method=method), SLIDING_WINDOW) for method in methods),
        Case(Layout(context=2), layout_settings=("train.attention=blocked",)),
    ]


def combined_cases() -> list[Case]:
    """Two and three kinds of parallelism at once."""
    layouts = [
        Layout(shard=2, tensor=2, sequence=True),
        Layout(shard=2, pipeline=2),
        Layout(shard=2, pipeline=2, zero=2),
        Layout(tensor=2, sequence=True, pipeline=2),
        Layout(shard=2, context=2),
        Layout(tensor=2, sequence=True, context=2),
        Layout(tensor=2, context=2, context_method="ulysses"),
        Layout(pipeline=2, context=2),
        Layout(shard=2, tensor=2, sequence=True, pipeline=2),
        Layout(shard=2, tensor=2, pipeline=2, schedule="zbv", stages_per_rank=2),
    ]
    return [
        Case(layout, TIED if layout.pipeline > 1 and layout.tensor > 1 else (), micro_batch=1) for layout in layouts
    ]


def recompute_cases() -> list[Case]:
    """Activation recomputation with each kind of parallelism."""
    full, selective = ("train.recompute=full",), ("train.recompute=selective",)
    interleaved = Layout(pipeline=2, schedule="interleaved", stages_per_rank=2, zero=2)
    zero_bubble = Layout(tensor=2, pipeline=2, schedule="interleaved_zero_bubble", stages_per_rank=2)
    return [
        Case(Layout(shard=2), layout_settings=full),
        Case(Layout(shard=2, tensor=2, sequence=True), layout_settings=selective),
        Case(Layout(tensor=2, context=2), layout_settings=(*full, "train.recompute_every=2")),
        Case(Layout(pipeline=2, shard=2), TIED, layout_settings=selective, micro_batch=1),
        Case(interleaved, layout_settings=full, micro_batch=1),
        Case(
            Layout(pipeline=2, schedule="zbv", stages_per_rank=2, zero=2),
            layout_settings=full,
            micro_batch=1,
        ),
        Case(zero_bubble, layout_settings=selective, micro_batch=1),
    ]


def bf16_cases() -> list[Case]:
    """Compute in bf16, and Muon, which orthogonalizes in bf16."""
    layouts = [
        Layout(shard=2),
        Layout(replicate=2, shard=2, zero=1),
        Layout(tensor=2, sequence=True),
        Layout(pipeline=2),
        Layout(pipeline=2, schedule="zbv", stages_per_rank=2, zero=2),
        Layout(context=2),
        Layout(context=2, context_method="ulysses"),
        Layout(shard=2, tensor=2, sequence=True, pipeline=2),
    ]
    muon_layouts = [Layout(shard=2), Layout(tensor=2, sequence=True), Layout(pipeline=2)]
    return [
        *(Case(layout, BF16, micro_batch=1) for layout in layouts),
        *(Case(layout, MUON, micro_batch=1) for layout in muon_layouts),
    ]


def expert_cases() -> list[Case]:
    """Expert parallelism with each kind of parallelism."""
    pipeline = {"pipeline": 2, "shard": 2, "expert": 2, "zero": 2}
    return [
        Case(Layout(shard=2), MOE),
        *(Case(Layout(shard=2, expert=2, zero=zero), MOE, micro_batch=1) for zero in (1, 2, 3)),
        *(Case(Layout(shard=4, expert=n, zero=zero), MOE, micro_batch=1) for zero in (1, 2, 3) for n in (2, 4)),
        *(Case(Layout(replicate=2, shard=2, expert=2, zero=zero), MOE, micro_batch=1) for zero in (1, 3)),
        Case(Layout(shard=4, reshard_to=2, expert=2), MOE),
        Case(Layout(tensor=2), MOE),
        Case(Layout(tensor=2, expert=2), SHARED),
        Case(Layout(tensor=2, sequence=True, expert=2), SHARED),
        Case(Layout(shard=2, expert_tensor=2), MOE),
        Case(Layout(shard=2, tensor=2, sequence=True, expert=2, expert_tensor=2), RANDOM),
        Case(Layout(shard=4, tensor=2, sequence=True, expert=4), MOE, micro_batch=1),
        Case(Layout(shard=2, context=2, tensor=2, expert=2, expert_tensor=2), MOE, micro_batch=1),
        Case(Layout(context=4, tensor=2, expert=8), SWITCH),
        Case(Layout(context=2, expert=2), CAPACITY),
        Case(Layout(context=2, tensor=2, context_method="ulysses", expert=2), CAPACITY),
        Case(Layout(**pipeline), MOE, micro_batch=1),
        Case(Layout(**pipeline, schedule="interleaved", stages_per_rank=2), MOE, micro_batch=1),
        Case(Layout(**pipeline, schedule="interleaved_zero_bubble", stages_per_rank=2), SHARED, micro_batch=1),
        Case(Layout(**pipeline, schedule="zbv", stages_per_rank=2), BIAS, micro_batch=1),
    ]


def expert_recipe_cases() -> list[Case]:
    """Ways to route and to train, with experts on two ranks."""
    layout = Layout(shard=2, expert=2)
    recipes = (BY_POSITION, BIAS, SHARED, FINE_GRAINED, RANDOM, (*MOE, *BF16), (*MOE, *MUON))
    return [
        *(Case(layout, settings) for settings in recipes),
        Case(Layout(shard=4, expert=2, expert_tensor=2), (*MOE, *MUON), micro_batch=1),
        Case(layout, MOE, layout_settings=("train.recompute=full",)),
        Case(Layout(shard=2, tensor=2, expert=2), SHARED, layout_settings=("train.recompute=selective",)),
    ]
