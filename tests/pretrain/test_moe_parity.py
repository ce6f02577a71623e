"""Mixtures of experts against transformers' Mixtral, Qwen3-MoE, OLMoE and dots.llm1: names, logits, every gradient and
the auxiliary loss, from the same weights."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pretrain.config import ModelConfig
from pretrain.config.model import MoeConfig
from pretrain.model.architectures.moe import MoETransformer
from pretrain.model.attention import document_mask
from pretrain.model.moe.router import Router

B, S = 2, 25
DOCUMENTS = ((0, 7, 18, 25), (0, 1, 25))
"""Where the documents of each row begin and end."""

SMALL = {
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
}
ODD = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "hidden_size": 30,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 37,
    "rms_norm_eps": 1e-5,
}
OUR_NAMES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "sliding_window": "sliding_window",
}


@dataclass(frozen=True)
class Case:
    """A model of transformers, and how ours is told to be like it."""

    family: str
    shape: dict[str, object]
    """In transformers' names, for both."""
    theirs: dict[str, object]
    moe: dict[str, object]
    model: dict[str, object] = field(default_factory=dict)


CASES = {
    "mixtral": Case("mixtral", SMALL, {"num_local_experts": 8, "num_experts_per_tok": 2}, {"n_experts": 8, "top_k": 2}),
    "mixtral, odd sizes, window": Case(
        "mixtral",
        ODD | {"sliding_window": 5},
        {"num_local_experts": 5, "num_experts_per_tok": 3},
        {"n_experts": 5, "top_k": 3},
    ),
    "mixtral, all experts, tied": Case(
        "mixtral",
        SMALL | {"tie_word_embeddings": True},
        {"num_local_experts": 4, "num_experts_per_tok": 4},
        {"n_experts": 4, "top_k": 4},
    ),
    "qwen3, normalized": Case(
        "qwen3",
        SMALL | {"head_dim": 16},
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
        {"n_experts": 16, "top_k": 4, "d_ff": 24},
        {"qk_norm": True},
    ),
    "qwen3, first layer dense, odd sizes": Case(
        "qwen3",
        ODD | {"head_dim": 14},
        {"num_experts": 13, "num_experts_per_tok": 5, "moe_intermediate_size": 11, "mlp_only_layers": [0]},
        {"n_experts": 13, "top_k": 5, "d_ff": 11, "n_dense_layers": 1, "normalize_top_k": False},
        {"qk_norm": True},
    ),
    "qwen3, every second layer, top-1": Case(
        "qwen3",
        ODD | {"head_dim": 10, "num_hidden_layers": 4},
        {"num_experts": 6, "num_experts_per_tok": 1, "moe_intermediate_size": 20, "decoder_sparse_step": 2},
        {"n_experts": 6, "top_k": 1, "d_ff": 20, "every_n_layers": 2, "normalize_top_k": False},
        {"qk_norm": True},
    ),
    "olmoe": Case(
        "olmoe",
        SMALL,
        {"num_experts": 8, "num_experts_per_tok": 3},
        {"n_experts": 8, "top_k": 3, "normalize_top_k": False},
        {"qk_norm": "full"},
    ),
    "olmoe, normalized, odd sizes": Case(
        "olmoe",
        ODD,
        {"num_experts": 7, "num_experts_per_tok": 2, "norm_topk_prob": True},
        {"n_experts": 7, "top_k": 2},
        {"qk_norm": "full"},
    ),
    "olmoe, many small experts": Case(
        "olmoe",
        SMALL | {"intermediate_size": 8, "num_key_value_heads": 4},
        {"num_experts": 64, "num_experts_per_tok": 8},
        {"n_experts": 64, "top_k": 8, "normalize_top_k": False},
        {"qk_norm": "full"},
    ),
    "dots": Case(
        "dots",
        SMALL,
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        {"n_experts": 8, "top_k": 3, "d_ff": 20, "n_shared_experts": 1, "n_dense_layers": 1}
        | {"routed_scaling_factor": 2.5},
        {"qk_norm": True},
    ),
    "dots, groups, two shared experts": Case(
        "dots",
        SMALL,
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
        },
        {"n_experts": 16, "top_k": 3, "d_ff": 12, "n_shared_experts": 2, "n_groups": 4, "top_k_groups": 2},
        {"qk_norm": True},
    ),
    "dots, not normalized, odd sizes": Case(
        "dots",
        ODD,
        {
            "n_routed_experts": 9,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 13,
            "n_shared_experts": 3,
            "n_group": 3,
            "topk_group": 2,
            "first_k_dense_replace": 2,
        },
        {"n_experts": 9, "top_k": 4, "d_ff": 13, "n_shared_experts": 3, "n_groups": 3, "top_k_groups": 2}
        | {"n_dense_layers": 2, "normalize_top_k": False},
        {"qk_norm": True},
    ),
}
FAMILIES = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "dots": (Dots1Config, Dots1ForCausalLM),
}


def their_model(case: Case) -> PreTrainedModel:
    """With random weights and router biases, larger than usual, so that nothing stays hidden behind a 1 or a 0."""
    config, model_class = FAMILIES[case.family]
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    settings = {"max_position_embeddings": 64, "rope_parameters": rope, "attn_implementation": "eager"}
    # The loop over experts: the plainest of their implementations.
    settings |= {"experts_implementation": "eager", "pad_token_id": None, "eos_token_id": None}
    model = model_class(config(**settings, **case.shape, **case.theirs))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            scale, offset = (0.1, 0.0) if name.endswith("bias") else (0.3, float(tensor.ndim == 1))
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator) + offset)
    return model


def our_config(case: Case, **moe: object) -> ModelConfig:
    sigmoid = {"score_function": "sigmoid", "expert_bias": True} if case.family == "dots" else {}
    settings = {"aux_loss": 0.0} | sigmoid | case.moe | moe
    shape = {OUR_NAMES[name]: value for name, value in case.shape.items()}
    return ModelConfig(architecture="moe", max_seq_len=64, moe=MoeConfig(**settings), **shape, **case.model)


def our_model(case: Case, theirs: PreTrainedModel, **moe: object) -> MoETransformer:
    """With the weights of theirs. `moe` are other settings."""
    with torch.device("meta"):
        model = MoETransformer(our_config(case, **moe))
    model.to_empty(device="cpu")
    model.reset_buffers()
    model.load_state_dict(theirs_state(theirs), strict=not moe)
    return model


def theirs_state(theirs: PreTrainedModel) -> dict[str, Tensor]:
    """{name: tensor}, a tied weight once."""
    tied = {"lm_head.weight"} if theirs.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in theirs.state_dict().items() if name not in tied}


def batch(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, S]; some tokens are not targets."""
    tokens = torch.randint(vocab_size, (B, S + 1), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].clone()
    labels[0, 3:6] = -100
    return tokens[:, :-1], labels


def spans(packed: bool) -> list[tuple[int, slice]]:
    """(row, tokens) of every document."""
    if not packed:
        return [(row, slice(0, S)) for row in range(B)]
    return [(row, slice(a, b)) for row in range(B) for a, b in zip(DOCUMENTS[row], DOCUMENTS[row][1:], strict=False)]


Result = tuple[Tensor, Tensor, dict[str, Tensor]]
"""(logits, summed cross-entropy, gradients)."""


def run_ours(model: MoETransformer, packed: bool = False, kernel: str = "sdpa") -> Result:
    ids, labels = batch(model.config.vocab_size)
    documents, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (row, tokens) in enumerate(spans(packed)):
        documents[row, tokens] = number
        positions[row, tokens] = torch.arange(tokens.stop - tokens.start)
    mask = document_mask(documents, positions, kernel, model.config)
    loss = model.loss(ids, labels, mask).total
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return model.logits(model(ids, mask)), loss.detach(), gradients


def run_theirs(model: PreTrainedModel, packed: bool = False) -> Result:
    """Every document alone: what packing must not change."""
    ids, labels = batch(model.config.vocab_size)
    logits = torch.zeros(B, S, model.config.vocab_size)
    loss = torch.zeros(())
    for row, tokens in spans(packed):
        own = model(input_ids=ids[row : row + 1, tokens]).logits[0]
        logits[row, tokens] = own.detach()
        loss = loss + F.cross_entropy(own, labels[row, tokens], reduction="sum", ignore_index=-100)
    loss.backward()
    return logits, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance of a parameter's gradient. Both must have the same parameters."""
    assert set(ours) == set(theirs)
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_buffers_have_the_names_and_shapes_of_transformers(name: str) -> None:
    theirs = their_model(CASES[name])
    ours = MoETransformer(our_config(CASES[name]))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert set(ours.state_dict()) == set(theirs_state(theirs))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_all_gradients_equal_transformers(name: str, packed: bool) -> None:
    theirs = their_model(CASES[name])
    logits, loss, gradients = run_ours(our_model(CASES[name], theirs), packed)
    their_logits, their_loss, their_gradients = run_theirs(theirs, packed)
    assert (logits - their_logits).abs().max() < 5e-5
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    assert gradient_error(gradients, their_gradients) < 2e-5


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("qwen3, normalized", {"normalize_top_k": False}),
        ("olmoe", {"normalize_top_k": True}),
        ("olmoe", {"softmax_after_top_k": True}),
        ("mixtral", {"top_k": 3}),
        ("dots", {"score_function": "softmax"}),
        ("dots", {"expert_bias": False}),
        ("dots", {"routed_scaling_factor": 1.0}),
        ("dots, groups, two shared experts", {"n_groups": 1, "top_k_groups": 1}),
        ("dots, groups, two shared experts", {"top_k_groups": 3}),
    ],
    ids=str,
)
def test_a_wrong_setting_is_seen(name: str, wrong: dict[str, object]) -> None:
    theirs = their_model(CASES[name])
    logits, _, _ = run_ours(our_model(CASES[name], theirs, **wrong))
    assert (logits - run_theirs(theirs)[0]).abs().max() > 1e-2


def test_softmax_after_the_choice_and_renormalization_are_the_same() -> None:
    """Mixtral's paper has the softmax after the choice, its code renormalizes (arXiv:2401.04088, section 2.1)."""
    theirs = their_model(CASES["mixtral"])
    logits, _, _ = run_ours(our_model(CASES["mixtral"], theirs, softmax_after_top_k=True))
    assert (logits - run_theirs(theirs)[0]).abs().max() < 1e-4


def test_gate_and_up_in_the_other_order_are_seen() -> None:
    theirs = their_model(CASES["mixtral"])
    ours = our_model(CASES["mixtral"], theirs)
    with torch.no_grad():
        gate_up = ours.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
        gate_up.copy_(gate_up.unflatten(1, (2, -1)).flip(1).flatten(1, 2))
    assert (run_ours(ours)[0] - run_theirs(theirs)[0]).abs().max() > 1e-2


def their_balancing_loss(theirs: PreTrainedModel, case: Case) -> Tensor:
    """Differentiable, over all tokens of the batch and all layers."""
    ids, _ = batch(theirs.config.vocab_size)
    logits = theirs(input_ids=ids, output_router_logits=True).router_logits
    loss = load_balancing_loss_func(logits, case.moe["n_experts"], case.moe["top_k"])
    assert isinstance(loss, Tensor)
    return loss


def our_balancing_losses(model: MoETransformer) -> list[float]:
    """Of each layer with experts, as the engine takes it: the sum over the tokens of a step, divided by them."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.begin_step(torch.tensor(1 / (B * S)))
    run_ours(model)
    for router in routers:
        router.evaluation_sums.zero_()  # of the logits, which are computed in a pass without gradients
    return [router.take_sums()[-4].item() / (B * S) for router in routers]


AUXILIARY = ["mixtral", "qwen3, normalized", "olmoe", "olmoe, normalized, odd sizes"]


def one_layer(case: Case) -> Case:
    return Case(case.family, case.shape | {"num_hidden_layers": 1}, case.theirs, case.moe, case.model)


@pytest.mark.parametrize("name", AUXILIARY)
def test_the_balancing_loss_of_a_layer_is_a_top_kth_of_transformers(name: str) -> None:
    """Theirs counts each of the K choices of a token as 1, ours as 1 / K: perfect balance is K there and 1 here."""
    case = one_layer(CASES[name])
    theirs = their_model(case)
    model = our_model(case, theirs, aux_loss=1.0, aux_loss_scope="microbatch")
    plain = run_ours(our_model(case, theirs))[2]
    (ours,) = our_balancing_losses(model)
    loss = their_balancing_loss(theirs, case) / case.moe["top_k"]
    assert ours == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    # Our backward pass adds its gradient to that of the cross-entropy.
    added = {name: p.grad - plain[name] for name, p in model.named_parameters() if p.grad is not None}
    router = "model.layers.0.mlp.gate.weight"
    assert (added[router] - expected[router]).norm() / expected[router].norm() < 1e-4
    assert expected[router].norm() > 1e-3


def test_over_several_layers_transformers_pools_tokens_and_ours_sums_layers() -> None:
    """A layer that prefers one expert and a layer that prefers another look balanced when they are pooled."""
    case = CASES["mixtral"]
    theirs = their_model(case)
    with torch.no_grad():
        for layer in range(2):
            theirs.get_parameter(f"model.layers.{layer}.mlp.gate.weight")[2 * layer : 2 * layer + 2] *= 3
    ours = our_balancing_losses(our_model(case, theirs, aux_loss=1.0, aux_loss_scope="microbatch"))
    pooled = their_balancing_loss(theirs, case).item() / 2
    assert sum(ours) / len(ours) > 1.02 * pooled


def test_bf16_logits_equal_transformers_within_bf16_rounding() -> None:
    """Experts of equal scores may be chosen otherwise, so compare errors, not numbers."""
    case = CASES["dots"]
    theirs = their_model(case)
    exact = run_theirs(theirs)[0]
    ours = our_model(case, theirs).bfloat16()
    rounded = run_theirs(theirs.bfloat16())[0].float()
    error = (run_ours(ours)[0].float() - exact).norm() / exact.norm()
    assert error < 1.5 * (rounded - exact).norm() / exact.norm()
