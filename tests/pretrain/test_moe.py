"""A layer with experts equals a loop over tokens and their experts: values, gradients, losses, statistics, noise."""

import pytest
import torch
from moe_reference import D, Reference, compute, make_layer, mask_of, model_config
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pretrain.model.moe.layer import MoE
from pretrain.model.moe.rows import PADDING, row_keys

CONFIGS: dict[str, dict[str, object]] = {
    "Switch": {"top_k": 1},
    "Mixtral": {"softmax_after_top_k": True},
    "Qwen3-MoE": {"n_experts": 16, "top_k": 8, "aux_loss_scope": "microbatch"},
    "OLMoE": {"top_k": 4, "normalize_top_k": False, "router_z_loss": 1e-3},
    "Qwen1.5-MoE": {"top_k": 3, "normalize_top_k": False, "n_shared_experts": 2, "shared_expert_gate": True},
    "DeepSeek-V2": {
        "top_k": 3,
        "n_groups": 4,
        "top_k_groups": 2,
        "normalize_top_k": False,
        "routed_scaling_factor": 16,
        "n_shared_experts": 2,
        "aux_loss_scope": "sequence",
    },
    "DeepSeek-V3": {
        "score_function": "sigmoid",
        "top_k": 4,
        "n_groups": 4,
        "top_k_groups": 3,
        "routed_scaling_factor": 2.5,
        "expert_bias": True,
        "n_shared_experts": 1,
        "aux_loss_scope": "sequence",
    },
    "sigmoid, one choice": {"score_function": "sigmoid", "top_k": 1, "router_z_loss": 0.1},
    "softmax and bias": {"top_k": 5, "expert_bias": True, "aux_loss_scope": "microbatch"},
    "all experts": {"top_k": 8},
    "six choices": {"top_k": 6, "softmax_after_top_k": True, "aux_loss": 0.0},
    "seven choices": {"n_experts": 7, "top_k": 7, "aux_loss": 1.0},
}
CAPACITY: dict[str, dict[str, object]] = {
    "dropless": {},
    "drop by score": {"capacity_factor": 0.7},
    "drop by position": {"capacity_factor": 0.7, "drop_policy": "position"},
}
COUNTED = [True, False, True]
"""The second row is padding."""
B, S = len(COUNTED), 11
N_TOKENS = sum(COUNTED) * S


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(input, gradient of the output)."""
    generator = torch.Generator().manual_seed(0)
    x_BSD, grad_BSD = (torch.randn(B, S, D, generator=generator) for _ in range(2))
    return x_BSD.to(dtype), grad_BSD.to(dtype)


def keys() -> Tensor:
    return row_keys(torch.tensor([7 * b if counts else PADDING for b, counts in enumerate(COUNTED)]), seed=3)


def run(layer: MoE, x_BSD: Tensor, grad_BSD: Tensor) -> dict[str, Tensor]:
    """The output, the gradients of input and parameters, and the statistics of one pass of a layer."""
    layer.gate.begin_step(torch.tensor(1 / N_TOKENS))
    layer.zero_grad()
    x_BSD = x_BSD.clone().requires_grad_()
    out_BSD = layer(x_BSD, mask_of(keys()))
    out_BSD.backward(grad_BSD)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x_BSD.grad is not None
    return {"out": out_BSD.detach(), "x": x_BSD.grad, "sums": layer.gate.take_sums(), **gradients}


def run_reference(layer: MoE, x_BSD: Tensor, grad_BSD: Tensor) -> tuple[dict[str, Tensor], Reference]:
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x_BSD = x_BSD.double().requires_grad_()
    reference = compute(layer, parameters, x_BSD, COUNTED)
    loss = (reference.out_BSD * grad_BSD.double()).sum() + (reference.aux_loss + reference.z_loss) / N_TOKENS
    found = torch.autograd.grad(loss, [x_BSD, *parameters.values()], allow_unused=True)
    x_grad, *gradients = (torch.zeros_like(x_BSD) if grad is None else grad for grad in found)
    losses = reference.aux_loss.item(), torch.as_tensor(reference.z_loss).item(), reference.entropy, reference.dropped
    sums = torch.tensor([*reference.counts, *losses], dtype=torch.float64)
    expected = {"out": reference.out_BSD.detach(), "x": x_grad, "sums": sums}
    return expected | dict(zip(parameters, gradients, strict=True)), reference


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, over the norm of what is expected unless that is 0 but for rounding."""
    norm = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / (norm if norm > 1e-12 else 1)


@pytest.mark.parametrize("capacity", CAPACITY)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_gradients_and_statistics_are_those_of_a_loop_over_tokens(name: str, capacity: str) -> None:
    layer = make_layer(model_config(**CONFIGS[name] | CAPACITY[capacity]))
    found, (expected, reference) = run(layer, *inputs()), run_reference(layer, *inputs())
    assert (reference.dropped > 0) == (capacity != "dropless")
    assert set(found) == set(expected)
    for key, value in found.items():
        assert distance(value, expected[key]) < 1e-5, key
    E = layer.gate.config.n_experts
    assert torch.equal(found["sums"][:E], expected["sums"][:E])  # counts are exact
    torch.testing.assert_close(found["sums"][E:], expected["sums"][E:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Switch", "Qwen3-MoE", "DeepSeek-V3", "Qwen1.5-MoE"])
def test_bf16_is_near_to_the_loop_in_fp64(name: str) -> None:
    """bf16 rounds to 2^-9 = 2e-3. Each value passes about five roundings, so 1%; experts are chosen in fp32."""
    layer = make_layer(model_config(**CONFIGS[name] | CAPACITY["drop by score"]), torch.bfloat16)
    arguments = layer, *inputs(torch.bfloat16)
    found, (expected, _) = run(*arguments), run_reference(*arguments)
    E = layer.gate.config.n_experts
    assert torch.equal(found["sums"][:E], expected["sums"][:E])
    torch.testing.assert_close(found["sums"][E:], expected["sums"][E:], rtol=1e-5, atol=1e-6)
    for key, value in found.items():
        assert distance(value, expected[key]) < 1e-2, key


MISTAKES: dict[str, tuple[dict[str, object], dict[str, object], set[str]]] = {
    "weights not normalized": ({}, {"normalize_top_k": False}, {"out", "x", "gate.weight"}),
    "softmax over all": ({"softmax_after_top_k": True, "normalize_top_k": False}, {"normalize_top_k": False}, {"out"}),
    "not scaled": ({"routed_scaling_factor": 2.5}, {}, {"out", "x"}),
    "best of a group instead of two": (
        {"score_function": "sigmoid", "n_groups": 4, "top_k_groups": 2},
        {"score_function": "sigmoid"},
        {"out", "sums"},
    ),
    "dropped by position": (CAPACITY["drop by score"], CAPACITY["drop by position"], {"out"}),
    "no auxiliary loss": ({"aux_loss": 1.0}, {"aux_loss": 0.0}, {"gate.weight", "sums"}),
    "load of the wrong scope": (
        {"aux_loss": 1.0, "aux_loss_scope": "sequence"},
        {"aux_loss": 1.0, "aux_loss_scope": "microbatch"},
        {"gate.weight", "sums"},
    ),
}
"""{mistake: (settings of the layer, those of the loop, what must differ)}."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_sees_a_mistake(mistake: str) -> None:
    ours, theirs, different = MISTAKES[mistake]
    layer, wrong = make_layer(model_config(**ours)), make_layer(model_config(**theirs))
    found, (expected, _) = run(layer, *inputs()), run_reference(wrong, *inputs())
    for key in different:
        assert distance(found[key], expected[key]) > 1e-3, key


def test_a_capacity_that_does_not_bind_is_dropless() -> None:
    dropless, roomy = (make_layer(model_config(**more)) for more in ({}, {"capacity_factor": 4.0}))
    found, expected = run(roomy, *inputs()), run(dropless, *inputs())
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("n_experts", [1, 64])
def test_all_tokens_to_one_expert_and_fewer_tokens_than_experts(n_experts: int) -> None:
    layer = make_layer(model_config(n_experts=n_experts, top_k=1))
    x_BSD, grad_BSD = inputs()
    with torch.no_grad():
        layer.gate.weight[0] = 10.0  # x is made positive, so expert 0 has by far the largest logit
    arguments = layer, x_BSD.abs(), grad_BSD
    found, (expected, reference) = run(*arguments), run_reference(*arguments)
    assert reference.counts == [N_TOKENS] + [0] * (n_experts - 1)
    for key, value in found.items():
        assert distance(value, expected[key]) < 1e-5, key
    for name in ("gate_up_proj", "down_proj"):
        assert not found[f"experts.{name}"][1:].any()


def test_rows_of_other_batches_change_nothing() -> None:
    """Each row is routed, computed and, with a capacity, dropped by itself."""
    layer, (x_BSD, _) = make_layer(model_config(capacity_factor=0.7)), inputs()
    together = layer(x_BSD, mask_of(None))
    apart = torch.cat([layer(row[None], mask_of(None)) for row in x_BSD])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [{}, CAPACITY["drop by score"], CONFIGS["DeepSeek-V3"], {"input_jitter": 0.1}, CONFIGS["Qwen1.5-MoE"]],
    ids=str,
)
def test_nothing_reads_a_value_on_the_host(more: dict[str, object]) -> None:
    """Fake tensors have no values: what a device would have to be waited for raises, such as .item() or nonzero()."""
    with FakeTensorMode():
        layer, x_BSD = make_layer(model_config(**more)), torch.randn(B, S, D, requires_grad=True)
        layer.gate.begin_step(torch.ones(()))
        layer(x_BSD, mask_of(torch.ones(B, dtype=torch.int64))).sum().backward()
        layer.gate.end_step(layer.gate.take_sums())
        assert x_BSD.grad is not None
        with torch.no_grad():
            layer(x_BSD, mask_of(None))
        with pytest.raises(DataDependentOutputException):
            x_BSD.sum().item()


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3", "Qwen1.5-MoE"])
@pytest.mark.parametrize("capacity", ["dropless", "drop by score"])
def test_a_layer_compiles_to_one_graph(name: str, capacity: str) -> None:
    layer = make_layer(model_config(**CONFIGS[name] | CAPACITY[capacity]))
    eager = run(layer, *inputs())
    torch.compiler.reset()
    layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    compiled = run(layer, *inputs())
    for key, value in eager.items():
        assert distance(compiled[key], value) < 1e-6, key


def test_buffers_are_new_leaves_wherever_the_layer_was_moved() -> None:
    layer = make_layer(model_config())
    layer.to(torch.float32)
    assert not layer.gate.probe.is_leaf or not layer.gate.probe.requires_grad  # negative control: moving breaks it
    layer.gate.reset_buffers(torch.device("meta"))
    assert {buffer.device.type for buffer in layer.gate.buffers()} == {"meta"}
    assert layer.gate.probe.is_leaf
    assert layer.gate.probe.requires_grad


def test_every_seed_that_the_settings_allow_gives_its_own_row_keys() -> None:
    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    keys = {seed: tuple(row_keys(torch.tensor([0, 7, PADDING]), seed).tolist()) for seed in seeds}
    assert len(set(keys.values())) == len(seeds)
    assert all(key[:2] >= (0, 0) and key[2] == PADDING for key in keys.values())


def test_noise_without_the_numbers_of_the_rows_is_refused() -> None:
    layer, (x_BSD, _) = make_layer(model_config(input_jitter=0.1)), inputs()
    with pytest.raises(ValueError, match="row_ids"):
        layer.gate(x_BSD, None)
    with torch.no_grad():
        layer.gate(x_BSD, None)
