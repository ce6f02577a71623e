"""Our training step beside that of `transformers`: the same Llama shape, batch and precision, in turns in one process.

Both sides are compiled, clip the global gradient norm to 1 and use fused AdamW. The peer holds bf16 weights and bf16
optimizer state, its fastest setting; ours also keeps fp32 master weights. Each alternation times a few steps of one
side, then of the other. The ratio is the median over alternations, because the machine's speed drifts. Model FLOPs are
counted by `pretrain.estimate.flops`.

    python -m benchmarks.step [--json FILE] [--alternations 5] [--steps 5]
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import make_parser, matmul_peak, print_table, time_calls
from parallel.engine import Microbatch
from pretrain.config import RunConfig
from pretrain.config.loading import validate
from pretrain.estimate.flops import flops_per_token, parameter_count
from pretrain.model.kernels import choose_backend
from pretrain.setup.engine import DTYPES, build_engine

LlamaShape = dict[str, int]
SHAPES: dict[str, LlamaShape] = {
    "cpu": {
        "d_model": 384,
        "n_layers": 6,
        "n_heads": 6,
        "n_kv_heads": 2,
        "d_ff": 1024,
        "vocab_size": 8192,
        "seq_len": 512,
        "batch": 8,
    },
    "cuda": {
        "d_model": 1024,
        "n_layers": 24,
        "n_heads": 16,
        "n_kv_heads": 16,
        "d_ff": 2816,
        "vocab_size": 32768,
        "seq_len": 2048,
        "batch": 8,
    },
}
"""12.6M parameters for CPUs, 336M for GPUs."""

WARM_UP = 3


def make_config(shape: LlamaShape, device: str, precision: str) -> RunConfig:
    """Return the resolved config of a shape, without document masks: the peer has none."""
    head_dim = shape["d_model"] // shape["n_heads"]
    attention, _ = choose_backend(device, precision=precision, compiled=True, head_dim=head_dim)
    model = {key: shape[key] for key in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab_size")}
    return validate(
        {
            "model": {**model, "max_seq_len": shape["seq_len"], "tie_embeddings": True, "document_mask": False},
            "data": {"seq_len": shape["seq_len"]},
            "train": {"device": device, "precision": precision, "compile": True, "attention": attention},
        }
    )


def our_step(config: RunConfig, ids: torch.Tensor) -> Callable[[], float]:
    """Return a function that takes one step of our engine and returns the loss."""
    engine = build_engine(config)
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    batch = Microbatch(ids, labels, positions, torch.zeros_like(positions), int((labels >= 0).sum()))
    return lambda: engine.train_step([batch], 1.0).loss


def transformers_step(config: RunConfig, ids: torch.Tensor) -> Callable[[], float]:
    """Return a function that takes one step of `LlamaForCausalLM`, written as a careful user would."""
    shape = config.model
    llama = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=shape.max_seq_len,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(llama).to(ids.device, DTYPES[config.train.precision])
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=config.optim.betas, weight_decay=0.1, fused=True
    )

    def step() -> float:
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--alternations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side that an alternation times")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[device.type]
    config = make_config(shape, device.type, args.precision)
    torch.manual_seed(0)
    ids = torch.randint(0, shape["vocab_size"], (shape["batch"], shape["seq_len"]), device=device)
    sides = {"pretrain": our_step(config, ids), "transformers": transformers_step(config, ids)}
    for step in sides.values():
        time_calls(step, device, WARM_UP)
    n_tokens, flops = ids.numel(), flops_per_token(config.model, shape["seq_len"])
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = []
    for _ in range(args.alternations):
        peaks.append(matmul_peak(device, DTYPES[args.precision]))
        for name, step in sides.items():
            speeds[name].append(n_tokens / median(time_calls(step, device, args.steps)))
    ratios = [ours / theirs for ours, theirs in zip(speeds["pretrain"], speeds["transformers"], strict=True)]
    rows: list[dict[str, object]] = [
        {
            "step": name,
            "tokens_per_s": median(speed),
            "fraction_of_matmul_peak": median(s * flops / peak for s, peak in zip(speed, peaks, strict=True)),
            "ratio": median(ratios) if name == "pretrain" else 1.0,
            "ratios": " ".join(f"{ratio:.2f}" for ratio in ratios) if name == "pretrain" else None,
        }
        for name, speed in speeds.items()
    ]
    title = (
        f"Training step, {parameter_count(config.model) / 1e6:.1f}M parameters, {args.precision}, "
        f"{shape['batch']} x {shape['seq_len']} tokens, attention {config.train.attention}; "
        f"matmul peak {median(peaks) / 1e9:,.0f} GFLOP/s"
    )
    print_table(title, rows, args.json)


if __name__ == "__main__":
    main()
