"""The estimates of memory and traffic equal what is built, what papers report, and hand calculations."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from parallel.layout import Layout
from parallel.pipeline.torch_schedules import schedule_actions
from pretrain.config import RunConfig
from pretrain.config.loading import load
from pretrain.estimate.activations import peak_in_flight
from pretrain.estimate.communication import estimate_traffic
from pretrain.estimate.flops import parameter_count, pipeline_costs
from pretrain.estimate.parameters import ModelParameter, model_parameters
from pretrain.estimate.rank_memory import estimate_rank_memory, find_peak_rank, layers_of_stages
from pretrain.model.architectures.llama import SPEC, Llama
from pretrain.setup.dry_run import measure
from pretrain.setup.engine import build_model_spec
from pretrain.setup.resolve import resolve_for_cluster

LLAMA_8B = 8_030_261_248
LLAMA_405B = 405_853_388_800
TINY = (
    "model.n_layers=6",
    "model.d_model=48",
    "model.n_heads=6",
    "model.n_kv_heads=2",
    "model.d_ff=80",
    "model.vocab_size=96",
)
SPLIT_DIMENSION = {"vocab_parallel_embedding": 0, "colwise": 0, "kv_colwise": 0, "rowwise": 1, "vocab_parallel_head": 0}


def planned(world_size: int, *args: str) -> tuple[RunConfig, Layout]:
    resolved = resolve_for_cluster(load(None, args).config, world_size)
    return resolved.config, resolved.layout


@pytest.mark.parametrize(
    "more", [(), ("model.tie_embeddings=true",), ("model.qk_norm=true", "model.qkv_bias=true")], ids=str
)
@pytest.mark.parametrize("layers", [range(6), range(2), range(2, 4), range(4, 6)], ids=str)
def test_the_parameters_are_those_of_the_model_and_split_as_its_plan_says(more: tuple[str, ...], layers: range) -> None:
    model = load(None, [*TINY, *more]).config.model
    with torch.device("meta"):
        built = {name: tuple(p.shape) for name, p in Llama(model, layers=layers).named_parameters()}
    found = model_parameters(model, layers, tensor=2)
    assert {parameter.name: parameter.shape for parameter in found} == built
    for parameter in found:
        name = parameter.name.rpartition(".")[0]
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        assert parameter.tensor_dim == SPLIT_DIMENSION.get(SPEC.tp_plan[pattern])


@pytest.mark.parametrize("ranks", [1, 3, 5, 16])
@pytest.mark.parametrize("rows", [1, 7, 16, 17])
def test_fsdp_chunks_rows_as_torch_chunk_does(rows: int, ranks: int) -> None:
    style, spec = SPEC.find("model.norm.weight")
    parameter, layout = ModelParameter("model.norm.weight", (rows, 2), spec, style), Layout(shard=ranks)
    chunks = [len(chunk) * 2 for chunk in torch.chunk(torch.empty(rows), ranks)]
    assert [parameter.elements(layout, rank) for rank in range(ranks)] == chunks + [0] * (ranks - len(chunks))


@pytest.mark.parametrize(
    "args",
    [
        ("parallel.tensor=2",),
        ("parallel.context=2", "parallel.pipeline=2", "model.tie_embeddings=true"),
        ("parallel.pipeline=2", "parallel.schedule=zbv"),
        ("parallel.tensor=6", "parallel.replicate_kv=true", "model.d_ff=96", "parallel.shard=2"),
        ("parallel.replicate=4", "parallel.shard=3"),
    ],
    ids=str,
)
def test_the_parameters_of_all_ranks_add_up_to_the_model(args: tuple[str, ...]) -> None:
    config, layout = planned(12, *TINY, "data.seq_len=48", "train.batch_size=48", *args)
    total = sum(estimate_rank_memory(config, layout, rank).n_parameters for rank in range(12)) // layout.replicate
    model = config.model
    whole_on_each = 13 * model.d_model + (2 * 6 * 2 * 8 * model.d_model if layout.tensor > model.n_kv_heads else 0)
    twice = model.vocab_size * model.d_model if model.tie_embeddings and layout.pipeline > 1 else 0
    assert total == parameter_count(model) + (layout.tensor - 1) * whole_on_each + twice


def test_405b_on_2048_ranks_is_405_853_388_800_parameters() -> None:
    args = (
        "model.preset=llama3-405b",
        "parallel.shard=8",
        "parallel.tensor=8",
        "parallel.pipeline=16",
        "parallel.context=2",
    )
    config, layout = planned(2048, *args, "train.batch_size=512", "data.seq_len=8192")
    first_of_fsdp = {(r // 128, r % 8): r for r in reversed(range(2048)) if layout.fsdp_rank(r) == 0}.values()
    held = [estimate_rank_memory(config, layout, rank) for rank in first_of_fsdp]
    assert len(held) == 16 * 8
    norms = 126 * 2 * 16384 + 16384
    assert sum(each.unsharded_elements for each in held) - 7 * norms == LLAMA_405B
    assert sum(16 * each.n_parameters for each in held) - 7 * norms == LLAMA_405B  # all rows divide by 16
    assert sum(len(layers) for layers in layers_of_stages(config, layout)) == 126
    assert estimate_rank_memory(config, layout, 0).master_bytes == 4 * 190_756_864


@pytest.mark.parametrize(
    ("zero", "master_weights", "compute_weights", "gradients", "optimizer"),
    [(1, 4 / 8, 2, 4, 8 / 8), (2, 4 / 8, 2, 4 / 8, 8 / 8), (3, 4 / 8, 0, 4 / 8, 8 / 8)],
)
def test_zero_divides_8b_on_8_ranks_as_the_formulas_say(
    zero: int, master_weights: float, compute_weights: float, gradients: float, optimizer: float
) -> None:
    config, layout = planned(
        8, "model.preset=llama3-8b", "data.seq_len=8192", "train.batch_size=32", f"parallel.zero={zero}"
    )
    held = estimate_rank_memory(config, layout, 0)
    found = (held.master_bytes, held.compute_weight_bytes, held.gradient_bytes, held.optimizer_bytes)
    assert found == tuple(LLAMA_8B * share for share in (master_weights, compute_weights, gradients, optimizer))
    block = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    assert held.gathered_bytes == (2 * (2 * block + 128256 * 4096 + 4096) if zero == 3 else 0)
    assert held.static_bytes == sum(found) + held.gathered_bytes


def test_replicas_divide_nothing() -> None:
    config, layout = planned(
        8, "model.preset=llama3-8b", "train.batch_size=8", "parallel.shard=1", "parallel.replicate=8"
    )
    assert estimate_rank_memory(config, layout, 7).master_bytes == 4 * LLAMA_8B
    assert estimate_rank_memory(config, replace(layout, shard=2, replicate=4), 7).master_bytes == 2 * LLAMA_8B


def test_one_process_has_compute_weights_in_bf16_only() -> None:
    config, layout = planned(1, *TINY, "data.seq_len=48")
    count = parameter_count(config.model)
    assert estimate_rank_memory(config, layout, 0).state_bytes == (4 + 2 + 4 + 8) * count
    config, layout = planned(1, *TINY, "data.seq_len=48", "train.precision=fp32")
    assert estimate_rank_memory(config, layout, 0).static_bytes == 16 * count


def test_muon_has_one_moment_for_the_matrices_of_the_blocks() -> None:
    config, layout = planned(2, *TINY, "data.seq_len=48", "optim.kind=muon", "parallel.shard=1", "parallel.replicate=2")
    matrices = 6 * (48 * 48 * 2 + 2 * 16 * 48 + 3 * 48 * 80)
    assert estimate_rank_memory(config, layout, 0).optimizer_bytes == 8 * parameter_count(config.model) - 4 * matrices


def test_offloaded_state_takes_no_device_memory() -> None:
    config, layout = planned(2, *TINY, "data.seq_len=48", "parallel.offload=true")
    held = estimate_rank_memory(config, layout, 0)
    assert held.static_bytes == held.gathered_bytes
    assert held.state_bytes == 16 * parameter_count(config.model) / 2


def test_the_peak_rank_has_the_most_static_bytes_of_all() -> None:
    config, layout = planned(
        12,
        *TINY,
        "data.seq_len=48",
        "train.batch_size=48",
        "parallel.pipeline=2",
        "parallel.shard=3",
        "parallel.context=2",
    )
    sizes = [estimate_rank_memory(config, layout, rank).static_bytes for rank in range(12)]
    assert find_peak_rank(config, layout) == sizes.index(max(sizes))
    assert min(sizes) < max(sizes)


def test_stages_have_the_layers_that_the_engine_gives_them() -> None:
    config, layout = planned(2, *TINY, "data.seq_len=48", "parallel.pipeline=2")
    spec = build_model_spec(config)
    assert pipeline_costs(config.model) == spec.costs
    assert [len(layers) for layers in layers_of_stages(config, layout)] == [3, 3]


@pytest.mark.parametrize("microbatches", [4, 8, 12, 20])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv"])
@pytest.mark.parametrize("cost", [0.2, 1.0, 4.0])
def test_microbatches_in_flight_peak_as_in_the_schedule(schedule: str, microbatches: int, cost: float) -> None:
    """Whatever a microbatch that waits for its weights' gradients costs, relative to one that is not that far."""
    layout = Layout(pipeline=4, schedule=schedule, stages_per_rank=1 if schedule in ("gpipe", "1f1b") else 2)
    change = {"forward": 1.0, "backward": -1.0, "input": cost - 1, "weight": -cost}
    for rank, actions in schedule_actions(layout, microbatches).items():
        most = max(accumulate(change[action.kind] for action in actions))
        assert max(
            begun + cost * waiting for begun, waiting in peak_in_flight(layout, rank, microbatches)
        ) == pytest.approx(most), rank


def test_a_block_of_8b_keeps_34_numbers_a_token_and_width() -> None:
    args = ("model.preset=llama3-8b", "data.seq_len=8192", "train.batch_size=1", "parallel.shard=1")
    config, layout = planned(1, *args)
    fewer, _ = planned(1, *args, "model.n_layers=31")
    block = (
        estimate_rank_memory(config, layout, 0).activation_bytes
        - estimate_rank_memory(fewer, layout, 0).activation_bytes
    )
    assert block == 8192 * (8 * 4096 + 4 * 4096 + 4 * 1024 + 6 * 14336 + 4 * 32)
    assert block / (8192 * 4096) == pytest.approx(34, abs=0.1)
    full, _ = planned(1, *args, "train.recompute=full")
    assert (
        estimate_rank_memory(full, layout, 0).activation_bytes
        - estimate_rank_memory(full, layout, 0).activation_bytes % 1
        < estimate_rank_memory(config, layout, 0).activation_bytes / 4
    )


def sent(world_size: int, *args: str, rank: int = 0) -> dict[str, dict[str, float]]:
    return estimate_traffic(*planned(world_size, *TINY, "data.seq_len=48", *args), rank)


def test_data_parallel_traffic_is_what_rings_send() -> None:
    count = parameter_count(load(None, TINY).config.model)
    at_end = 96 * 48 + 48
    args = ("train.batch_size=16", "train.micro_batch_size=2")  # 4 microbatches on 2 ranks
    three, two, one = (sent(2, *args, f"parallel.zero={zero}")["fsdp"] for zero in (3, 2, 1))
    assert three == {"all-gather": 4 * (2 * count - at_end), "reduce-scatter": 4 * 2 * count}
    assert two == {"all-gather": count, "reduce-scatter": 4 * 2 * count}
    assert one == {"all-gather": count, "reduce-scatter": 2 * count}
    assert sent(4, *args, "parallel.shard=1", "parallel.replicate=4")["replicate"] == {
        "all-reduce": 2 * 3 / 4 * 4 * count
    }
    hybrid = sent(4, *args, "parallel.shard=2", "parallel.replicate=2")
    assert hybrid["replicate"] == {"all-reduce": 4 * count / 2}


def test_activation_traffic_is_what_rings_send() -> None:
    args = ("train.batch_size=4", "train.micro_batch_size=2", "parallel.shard=1")
    numbers = 4 * 48 * 48  # tokens x width of a step
    tensor = sent(2, *args, "parallel.tensor=2", "parallel.sequence=false")["tensor"]
    assert tensor == {"all-reduce": 2 * 1 / 2 * 2 * numbers * (6 * 4 + 2) + 3 * 4 * 4 * 48}
    context = sent(2, *args, "parallel.context=2")["context"]
    key_values = 4 * 48 * 2 * 16
    assert context == {"all-gather": 6 * 1 / 2 * 2 * key_values, "reduce-scatter": 6 * 1 / 2 * 2 * key_values}
    ulysses = sent(2, *args, "parallel.context=2", "parallel.context_method=ulysses")["context"]
    assert ulysses == {"all-to-all": 2 * 6 * 1 / 2 * 2 * (4 * 24) * (2 * 48 + 2 * 16)}
    assert sent(2, *args, "parallel.pipeline=2")["pipeline"] == {"send": 2 * numbers}
    assert sent(3, *args, "parallel.pipeline=3", "train.micro_batch_size=1", rank=1)["pipeline"] == {
        "send": 2 * 2 * numbers
    }


@pytest.mark.parametrize(("sequence", "recompute"), [("true", "none"), ("false", "full")])
def test_norms_over_all_heads_exchange_their_mean_squares(sequence: str, recompute: str) -> None:
    args = (
        *(*TINY, "model.n_kv_heads=2", "data.seq_len=48", "train.batch_size=4", "train.micro_batch_size=2"),
        *("parallel.shard=1", "parallel.tensor=2", f"parallel.sequence={sequence}", f"train.recompute={recompute}"),
    )
    norms = {}
    for width in ("true", "full"):
        run = resolve_for_cluster(load(None, [*args, f"model.qk_norm={width}"]).config, 2)
        norms[width] = estimate_traffic(run.config, run.layout, 0)["tensor"]
        measured = measure(run.config, run.layout, 0).sent["tensor"]
        assert {name: measured[name] for name in norms[width]} == pytest.approx(norms[width], rel=1e-2)
    extra = {name: norms["full"][name] - norms["true"].get(name, 0) for name in ("all-gather", "reduce-scatter")}
    one_way = 2 * 4 * (4 * 48) * 6  # two norms, in fp32, of all tokens, in 6 layers
    assert extra == {"all-gather": one_way * (1 + (recompute == "full")), "reduce-scatter": one_way}


def test_sequence_parallelism_sends_no_more_than_it_replaces() -> None:
    args = ("train.batch_size=4", "train.micro_batch_size=2", "parallel.shard=1", "parallel.tensor=2")
    sequence, whole = (sent(2, *args, f"parallel.sequence={on}")["tensor"] for on in ("true", "false"))
    vectors = 2 * 1 / 2 * 2 * 2 * 13 * 48  # gradients of the norms in bf16, of 2 microbatches
    assert sum(sequence.values()) == sum(whole.values()) + vectors


def test_every_second_layer_gathers_again_whatever_the_stages() -> None:
    """One layer a stage: those of the second and fourth recompute."""
    args = (
        *TINY,
        "model.n_layers=4",
        "data.seq_len=64",
        "train.batch_size=8",
        "parallel.pipeline=4",
        "parallel.tensor=2",
    )
    ranks = [stage * 2 for stage in range(4)]
    plain, recomputing = (
        [sent(8, *args, *more, rank=rank)["tensor"]["all-gather"] for rank in ranks]
        for more in ((), ("train.recompute=full", "train.recompute_every=2"))
    )
    assert [again / once for once, again in zip(plain, recomputing, strict=True)] == pytest.approx([1, 1.5, 1, 1.4])
