"""Time a training step with experts. Compare it with a dense model of equal active FLOPs, and with `transformers`.

Two cases with the widths of small models, in bf16, with the router as it learns: few large experts (Mixtral's design)
and many small ones (Qwen3-MoE's). All sides take their steps in turns in one process: each alternation times a few
steps of each, and a ratio is the median over alternations, because the machine's speed drifts. Every step has new
tokens, so the experts get new numbers of rows.

All sides clip the global gradient norm to 1 and use fused AdamW. Ours keep fp32 master weights and balance the load by
the auxiliary loss. The peers hold bf16 weights and bf16 optimizer state and compute no auxiliary loss, their fastest
settings. Of a peer's `experts_implementation`s, each compiled and not, the fastest of a short trial is timed.
`batched_mm` is not tried: it copies an expert's matrices for every row, which is 17 GB in these cases.

Then the parts of one layer, forward and backward, each compiled and timed by itself: the router, the permutation of
tokens into rows, the experts, and the sum of each token's rows (`combine`). `kept_MB` is what the layer keeps for the
backward pass without the compiler, beside its input and weights. CPU only: `benchmarks.gpu` measures GPUs.

    python -m benchmarks.moe [--json FILE] [--alternations 7] [--steps 3] [--layers 4] [--case E8] [--only step]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common import make_parser, matmul_peak, print_table, time_calls
from parallel.engine import Microbatch
from pretrain.config import RunConfig
from pretrain.config.loading import validate
from pretrain.model.attention import DocumentMask
from pretrain.model.kernels import choose_backend
from pretrain.model.mlp import MLP
from pretrain.model.moe.layer import MoE
from pretrain.setup.engine import build_engine

CPU = torch.device("cpu")
D, VOCABULARY, HEADS, ROWS, SEQ_LEN = 512, 8192, 8, 8, 512
WARM_UP = 3
Step = Callable[[], object]
Row = dict[str, object]


class Case(NamedTuple):
    """A mixture of experts, and the class of `transformers` that has the same layers."""

    n_experts: int
    top_k: int
    d_ff: int
    qk_norm: bool
    peer: str


CASES = {"E8": Case(8, 2, 1024, False, "Mixtral"), "E64": Case(64, 8, 256, True, "Qwen3-MoE")}


def make_config(case: Case, n_layers: int, dense: bool) -> RunConfig:
    """Return the resolved config of our side, or of the dense model with the same FLOPs a token."""
    attention, _ = choose_backend("cpu", precision="bf16", compiled=True, head_dim=D // HEADS)
    model: dict[str, object] = {
        "d_model": D,
        "n_layers": n_layers,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "d_ff": case.top_k * case.d_ff,
        "vocab_size": VOCABULARY,
        "max_seq_len": SEQ_LEN,
        "tie_embeddings": True,
        "document_mask": False,
        "qk_norm": case.qk_norm,
    }
    if not dense:
        sizes = {"n_experts": case.n_experts, "top_k": case.top_k, "d_ff": case.d_ff}
        model |= {"architecture": "moe", "moe": sizes}
    train = {"device": "cpu", "precision": "bf16", "compile": True, "attention": attention}
    return validate({"model": model, "data": {"seq_len": SEQ_LEN}, "train": train})


def random_tokens() -> Iterator[Tensor]:
    """Batches of token ids, [ROWS, SEQ_LEN]."""
    generator = torch.Generator().manual_seed(0)
    return cycle([torch.randint(0, VOCABULARY, (ROWS, SEQ_LEN), generator=generator) for _ in range(16)])


def our_step(config: RunConfig) -> Step:
    """Return a function that takes one step of our engine."""
    engine, batches = build_engine(config), random_tokens()
    positions = torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN)

    def step() -> float:
        ids = next(batches)
        labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), 1)
        batch = Microbatch(ids, labels, positions, torch.zeros_like(positions), int((labels >= 0).sum()))
        return engine.train_step([batch], 1.0).loss

    return step


def build_peer(case: Case, n_layers: int, implementation: str) -> PreTrainedModel:
    """Build the model of `transformers` in bf16."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": D // HEADS,
        "max_position_embeddings": SEQ_LEN,
        "num_experts_per_tok": case.top_k,
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": "sdpa",
        "experts_implementation": implementation,
    }
    torch.manual_seed(0)
    if case.peer == "Mixtral":
        mixtral = MixtralConfig(**config, num_local_experts=case.n_experts, intermediate_size=case.d_ff)
        return MixtralForCausalLM(mixtral).bfloat16()
    qwen = Qwen3MoeConfig(
        **config, num_experts=case.n_experts, moe_intermediate_size=case.d_ff, norm_topk_prob=True, mlp_only_layers=[]
    )
    return Qwen3MoeForCausalLM(qwen).bfloat16()


def peer_step(model: PreTrainedModel, compiled: bool) -> Step:
    """Return a function that takes one step of the peer, written as a careful user would."""
    forward, batches = torch.compile(model) if compiled else model, random_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        ids = next(batches)
        loss: Tensor = forward(input_ids=ids, labels=ids).loss
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def fastest_peer(case: Case, n_layers: int) -> tuple[str, Step]:
    """Try the ways to run the peer, and return the fastest with its name."""
    tried: dict[str, tuple[float, Step]] = {}
    for implementation in ("eager", "grouped_mm"):
        for compiled in (False, True):
            name = f"{case.peer} {implementation}{' compiled' if compiled else ''}"
            step = peer_step(build_peer(case, n_layers, implementation), compiled)
            time_calls(step, CPU, WARM_UP)
            tried[name] = median(time_calls(step, CPU, 3)), step
            Console(stderr=True).print(f"trial: {name} {1000 * tried[name][0]:,.0f} ms a step", highlight=False)
    name = min(tried, key=lambda name: tried[name][0])
    return name, tried[name][1]


def step_rows(name: str, case: Case, n_layers: int, alternations: int, steps: int) -> list[Row]:
    """Time whole steps of the three sides in turns."""
    peer, theirs = fastest_peer(case, n_layers)
    sides = {
        "ours": our_step(make_config(case, n_layers, dense=False)),
        "dense": our_step(make_config(case, n_layers, dense=True)),
        "theirs": theirs,
    }
    for step in sides.values():
        time_calls(step, CPU, WARM_UP)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(alternations):
        for side, step in sides.items():
            seconds[side].append(median(time_calls(step, CPU, steps)))
    to_dense = [ours / dense for ours, dense in zip(seconds["ours"], seconds["dense"], strict=True)]
    speedups = [theirs / ours for theirs, ours in zip(seconds["theirs"], seconds["ours"], strict=True)]
    ours: Row = {
        "case": name,
        "what": "step",
        "ms": 1000 * median(seconds["ours"]),
        "ratio_to_dense": median(to_dense),
        "speedup_over_transformers": median(speedups),
        "ratios": f"{' '.join(f'{ratio:.2f}' for ratio in to_dense)}; {' '.join(f'{ratio:.2f}' for ratio in speedups)}",
    }
    others = {"step, dense": "dense", f"step, {peer}": "theirs"}
    return [ours, *({"case": name, "what": what, "ms": 1000 * median(seconds[key])} for what, key in others.items())]


def kept_megabytes(function: Callable[..., Tensor], x: Tensor, module: nn.Module) -> float:
    """Memory that the backward pass needs, without `x` and the parameters."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(x)  # alive until the sum is taken, so that no address is used twice
    del out
    return sum(storages.values()) / 1e6


def layer_rows(name: str, case: Case) -> list[Row]:
    """Time one layer beside the dense layer in turns, and the parts of it."""
    torch.manual_seed(0)
    moe = MoE(make_config(case, 1, dense=False).model, 0)
    mlp = MLP(D, case.top_k * case.d_ff)
    for parameter in (*moe.parameters(), *mlp.parameters()):
        parameter.data = torch.randn_like(parameter).mul_(0.02).bfloat16()
    x_BSD = torch.randn(ROWS, SEQ_LEN, D).bfloat16().requires_grad_()
    mask = DocumentMask("sdpa", None, torch.arange(SEQ_LEN).expand(ROWS, SEQ_LEN), None, ())

    x_TD = x_BSD.detach().flatten(0, 1).requires_grad_()
    routing = moe.gate(x_BSD, None)
    weight_TK = routing.weight_TK.detach().requires_grad_()

    def dispatch(x_TD: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        rows = moe.dispatcher.receive(moe.dispatcher.send(x_TD, routing.expert_TK, weight_TK, None))
        return rows.x_XD, rows.weight_X

    with torch.no_grad():
        in_flight = moe.dispatcher.send(x_TD, routing.expert_TK, weight_TK, None)
        rows = moe.dispatcher.receive(in_flight)
    x_XD, weight_X = rows.x_XD.requires_grad_(), rows.weight_X.requires_grad_()
    timed: dict[str, Step] = {
        "layer": both_passes(lambda x: moe(x, mask), x_BSD),
        "layer, dense": both_passes(mlp, x_BSD),
        "router": both_passes(lambda x: moe.gate(x, None).weight_TK, x_BSD),
        "permutation": both_passes(dispatch, x_TD, weight_TK),
        "experts": both_passes(lambda x, w: moe.experts(rows._replace(x_XD=x, weight_X=w)), x_XD, weight_X),
        "combine": both_passes(lambda y: moe.dispatcher.combine(y, in_flight), x_XD),
    }
    for step in timed.values():
        time_calls(step, CPU, WARM_UP)
    seconds: dict[str, list[float]] = {part: [] for part in timed}
    peaks = []
    for _ in range(9):
        peaks.append(matmul_peak(CPU, torch.bfloat16, repeats=3))
        for part, step in timed.items():
            seconds[part] += time_calls(step, CPU, 1)
    table: list[Row] = [{"case": name, "what": part, "ms": 1000 * median(times)} for part, times in seconds.items()]
    table[0]["ratio_to_dense"] = median(
        ours / dense for ours, dense in zip(seconds["layer"], seconds["layer, dense"], strict=True)
    )
    table[0]["kept_MB"] = kept_megabytes(lambda x: moe(x, mask), x_BSD, moe)
    table[1]["kept_MB"] = kept_megabytes(mlp, x_BSD, mlp)
    flops = 3 * 2 * ROWS * SEQ_LEN * case.top_k * 3 * D * case.d_ff
    return [*table, {"case": name, "what": "products at the matmul peak", "ms": 1000 * flops / median(peaks)}]


def both_passes(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Step:
    """Compile the function, and return one that runs its forward and backward pass."""
    compiled = torch.compile(function)

    def run() -> None:
        outs = compiled(*inputs)
        outs = (outs,) if isinstance(outs, Tensor) else outs
        torch.autograd.backward(outs, [out.detach() for out in outs])

    return run


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--alternations", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side that an alternation times")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--case", choices=tuple(CASES), help="only this case")
    parser.add_argument("--only", choices=("step", "layer"), help="only whole steps, or only the layer and its parts")
    args = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if args.case in (None, name)}
    rows: list[Row] = []
    for name, case in cases.items():
        if args.only != "layer":
            rows += step_rows(name, case, args.layers, args.alternations, args.steps)
        if args.only != "step":
            rows += layer_rows(name, case)
    shapes = "; ".join(f"{name}: {case.top_k} of {case.n_experts} x {case.d_ff}" for name, case in cases.items())
    title = f"bf16, {ROWS} x {SEQ_LEN} tokens, d_model {D}, {args.layers} layers, {VOCABULARY} words; experts {shapes}"
    print_table(title, rows, args.json)


if __name__ == "__main__":
    main()
