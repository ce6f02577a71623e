"""Tensor and sequence parallelism: loss and gradients, the number of collectives, and negative controls."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group  # the compiler asks this
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from workers import WorkerPool

from parallel import tensor
from parallel.errors import LayoutError
from parallel.layout import Layout
from parallel.local import local_shard
from parallel.mesh import build_mesh, data_mesh
from parallel.torch_compat import enable_symmetric_memory
from pretrain.config import ModelConfig
from pretrain.estimate.parameters import model_parameters
from pretrain.model.architectures.llama import SPEC, Llama
from pretrain.model.init import init_shard, init_weights
from pretrain.model.loss import softmax_gradient_

TINY = ModelConfig(
    vocab_size=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=32, init_std=0.2
)
Gradients = dict[str, Tensor]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(input ids, labels, document ids), [2, 16]: two documents per row, some tokens without a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(TINY.vocab_size, (2, 17), generator=generator)
    labels = ids[:, 1:].clone()
    labels[0, 3:6] = -100
    return ids[:, :-1], labels, (torch.arange(16) >= 7).long().expand(2, 16)


def loss_and_gradients(model: Llama) -> tuple[float, Gradients]:
    ids, labels, documents = batch()
    positions = torch.cat((torch.arange(7), torch.arange(9))).expand(2, 16)
    sums = model.loss(ids, labels, model.document_mask(documents, positions), 1e-3)
    sums.total.backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
    return sums.total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_single_process(config: ModelConfig) -> tuple[float, Gradients]:
    model = Llama(config)
    init_weights(model, 3)
    return loss_and_gradients(model)


def build_parallel_model(config: ModelConfig, sequence: bool, compiled: bool = False) -> Llama:
    """As the engine builds it: shapes, tensor parallelism, compilation, FSDP2 (over one rank), memory, values."""
    layout = Layout(tensor=torch.distributed.get_world_size())
    mesh = build_mesh(layout, "cpu")
    with torch.device("meta"):
        model = Llama(config)
    tensor.apply_tensor_parallel(model, mesh["tensor"], model.tp_plan, sequence=sequence, replicate_kv=True)
    if compiled:
        compiled_by = {"backend": "aot_eager", "fullgraph": True}
        model.linear_loss = partial(model.linear_loss, softmax=torch.compile(softmax_gradient_, **compiled_by))
        for layer in model.layers:
            layer.compile(**compiled_by)
    for module in (*model.layers, model):
        fully_shard(module, mesh=data_mesh(mesh, layout))
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        init_shard(name, *local_shard(parameter), config, 3)
    return model


BROKEN = {
    "sum after o_proj and down_proj left out": {"rowwise": lambda *_: tensor.ParallelStyle(Shard(1), Shard(1))},
    "gradient of q_norm not summed": {"qk_norm": lambda *_: tensor.ParallelStyle(Replicate(), Replicate())},
    "every rank normalizes its own heads": {
        "qk_norm": lambda ranks, parent, norm: tensor._qk_norm(ranks, parent, norm)._replace(wrap=None)
    },
    "ranks take turns in the key/value heads": {
        "kv_colwise": lambda ranks, parent, part: tensor._kv_colwise(ranks, parent, part)._replace(
            rows=slice(
                ranks.mesh.get_local_rank() % 2 * parent.head_dim,
                (ranks.mesh.get_local_rank() % 2 + 1) * parent.head_dim,
            )
        )
    },
}


def run_rank(config: ModelConfig, sequence: bool, compiled: bool = False, broken: str = "") -> tuple[float, Gradients]:
    with patch.dict(tensor._STYLES, BROKEN[broken]) if broken else nullcontext():
        loss, gradients = loss_and_gradients(build_parallel_model(config, sequence, compiled))
    return loss, {name: gradient.full_tensor() for name, gradient in gradients.items() if isinstance(gradient, DTensor)}


def errors(config: ModelConfig, results: list[tuple[float, Gradients]]) -> tuple[float, float]:
    """Largest relative error over ranks of the loss, and over ranks and parameters of the gradient."""
    loss, expected = run_single_process(config)
    assert all(set(gradients) == set(expected) for _, gradients in results)
    worst = max(
        float((g[name] - expected[name]).norm() / expected[name].norm()) for _, g in results for name in expected
    )
    return max(abs(ours - loss) / loss for ours, _ in results), worst


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"qk_norm": True, "qkv_bias": True}),
        (4, {"qk_norm": True, "qkv_bias": True}),  # more ranks than key/value heads
        (4, {"n_kv_heads": 1, "tie_embeddings": True}),
        (2, {"tie_embeddings": True}),
        (2, {"qk_norm": "full"}),
        (4, {"qk_norm": "full"}),  # more ranks than key/value heads
    ],
)
def test_loss_and_gradients_match_one_process(
    workers: WorkerPool, size: int, sequence: bool, changes: dict[str, object]
) -> None:
    config = TINY.model_copy(update=changes)
    loss, gradient = errors(config, workers.run(run_rank, size, config, sequence))
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize("sequence", [True, False])
def test_compiled_blocks_are_one_graph_and_match(workers: WorkerPool, sequence: bool) -> None:
    config = TINY.model_copy(update={"qk_norm": "full" if sequence else True, "qkv_bias": True})
    loss, gradient = errors(config, workers.run(run_rank, 2, config, sequence, True))
    assert loss < 1e-6
    assert gradient < 1e-5


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_style_is_detected(workers: WorkerPool, broken: str) -> None:
    config = TINY.model_copy(update={"qk_norm": "full" if broken == "every rank normalizes its own heads" else True})
    _, gradient = errors(config, workers.run(run_rank, 4, config, False, False, broken))
    assert gradient > 1e-2


def collectives(n_layers: int, sequence: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Number of collectives in the (forward, backward) pass by name, of a model with values and without FSDP2."""
    model = Llama(TINY.model_copy(update={"n_layers": n_layers}))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    tensor.apply_tensor_parallel(model, mesh, model.tp_plan, sequence=sequence, replicate_kv=False)
    ids, labels, documents = batch()
    mask = model.document_mask(documents, torch.arange(16).expand(2, 16))
    counts = []
    with CommDebugMode() as forward:
        total = model.loss(ids, labels, mask).total
    with CommDebugMode() as backward:
        total.backward()
    for mode in (forward, backward):
        counts.append({str(name).rpartition(".")[2]: count for name, count in mode.get_comm_counts().items()})
    return counts[0], counts[1]


def test_a_block_has_two_gathers_and_two_scatters_per_pass_with_sequence_and_two_all_reduces_without(
    workers: WorkerPool,
) -> None:
    for sequence, names in ((True, ("all_gather_into_tensor", "reduce_scatter_tensor")), (False, ("all_reduce",))):
        one, two = (workers.run(collectives, 2, n_layers, sequence)[0] for n_layers in (1, 2))
        for way in (0, 1):
            more = {
                name: count - one[way].get(name, 0)
                for name, count in two[way].items()
                if count != one[way].get(name, 0)
            }
            assert more == dict.fromkeys(names, 2)


def test_outside_of_blocks_are_one_reduction_one_gather_and_two_small_all_reduces_per_loss_chunk(
    workers: WorkerPool,
) -> None:
    forward, backward = workers.run(collectives, 2, 1, True)[0]
    assert forward == {"all_gather_into_tensor": 2 + 1, "reduce_scatter_tensor": 2 + 1, "allreduce_": 2}
    assert backward == {"all_gather_into_tensor": 2 + 1, "reduce_scatter_tensor": 2 + 1}


def refusal_messages() -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    cases: list[tuple[dict[str, object], dict[str, str]]] = [
        ({}, {**SPEC.tp_plan, "lm_head": "diagonal"}),
        ({}, {**SPEC.tp_plan, "model.layers.*.mlp.middle_proj": "colwise"}),
        ({}, {name: word for name, word in SPEC.tp_plan.items() if name != "model.layers.*.mlp.up_proj"}),
        ({"n_kv_heads": 1}, SPEC.tp_plan),
        ({"d_ff": 33}, SPEC.tp_plan),
        ({"qkv_bias": True}, {**SPEC.tp_plan, "model.layers.*.self_attn.q_proj": "rowwise"}),
    ]
    said = []
    for changes, plan in cases:
        with torch.device("meta"):
            model = Llama(TINY.model_copy(update=changes))
        with pytest.raises(ValueError, match=r"\w") as error:
            tensor.apply_tensor_parallel(model, mesh, plan, sequence=True, replicate_kv=False)
        said.append(str(error.value))
    with pytest.raises(LayoutError) as refused:
        tensor.enable_async(mesh)
    return [*said, str(refused.value)]


def test_refusals_name_what_cannot_be_split(workers: WorkerPool) -> None:
    for said in workers.run(refusal_messages, 2):
        assert said[0].startswith(
            "the plan says 'diagonal' for lm_head; styles are vocab_parallel_embedding, sequence_parallel"
        )
        assert said[1:] == [
            "the plan's pattern model.layers.*.mlp.middle_proj finds nothing: model.layers.0.mlp has no 'middle_proj'",
            "the plan has no pattern for model.layers.0.mlp.up_proj.weight",
            "1 key/value heads cannot be shared out to 2 ranks with replicate_kv=False",
            "model.layers.0.mlp.gate_proj.weight: 33 rows cannot be shared out to 2 ranks",
            "rowwise cannot split a module with a bias: it would be added once a rank",
            "parallel.async_tensor=true needs CUDA, and this run is on cpu; set it to false",
        ]


def is_on_the_compilers_list() -> list[bool]:
    """Whether the compiler would overlap the collectives of a group, before and after `enable_symmetric_memory`."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    name = mesh.get_group().group_name
    before = is_symm_mem_enabled_for_group(name)
    enable_symmetric_memory(name)
    return [before, is_symm_mem_enabled_for_group(name)]


def test_async_tensor_parallelism_puts_the_group_on_the_compilers_list(workers: WorkerPool) -> None:
    """The compiler silently skips groups that are not on its list."""
    assert workers.run(is_on_the_compilers_list, 2) == [[False, True]] * 2


def assert_values_are_kept() -> None:
    """Each rank keeps its shard of the values that the module had."""
    full_model = Llama(TINY)
    init_weights(full_model, 3)
    model = Llama(TINY)
    init_weights(model, 3)
    tensor.apply_tensor_parallel(model, init_device_mesh("cpu", (2,)), model.tp_plan, sequence=True, replicate_kv=False)
    estimated = {each.name: each.tensor_dim for each in model_parameters(TINY, range(TINY.n_layers), tensor=2)}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        placement = parameter.placements[0]
        assert estimated[name] == (placement.dim if isinstance(placement, Shard) else None)
        assert torch.equal(parameter.full_tensor(), full_model.get_parameter(name))
        assert (
            parameter.to_local().numel() * (2 if isinstance(parameter.placements[0], Shard) else 1) == parameter.numel()
        )


def test_a_module_with_values_keeps_them(workers: WorkerPool) -> None:
    workers.run(assert_values_are_kept, 2)
