"""The whole model against transformers' Llama, Qwen3, Qwen2 and Mistral: names, logits and every gradient, from the
same weights."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pretrain.config import ModelConfig, RopeConfig
from pretrain.model.architectures.llama import Llama
from pretrain.model.attention import document_mask

B, S, V = 2, 24, 96
SHAPE = ModelConfig(
    vocab_size=V, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_seq_len=64, norm_eps=1e-6
)
THEIR_SHAPE = {
    "vocab_size": V,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Case:
    ours: dict[str, object]
    theirs: PreTrainedModel


def case(name: str) -> Case:
    torch.manual_seed(0)
    match name:
        case "llama":
            return Case({}, LlamaForCausalLM(LlamaConfig(**THEIR_SHAPE, rope_parameters=DEFAULT_ROPE)))
        case "llama tied, multi-head":
            changed = {"tie_word_embeddings": True, "num_key_value_heads": 4}
            theirs = LlamaForCausalLM(LlamaConfig(**(THEIR_SHAPE | changed), rope_parameters=DEFAULT_ROPE))
            return Case({"tie_embeddings": True, "n_kv_heads": 4}, theirs)
        case "llama yarn, multi-query":
            theirs = LlamaForCausalLM(LlamaConfig(**(THEIR_SHAPE | {"num_key_value_heads": 1}), rope_parameters=YARN))
            return Case({"rope": RopeConfig(kind="yarn", factor=4, original_max_seq_len=16), "n_kv_heads": 1}, theirs)
        case "qwen3":
            theirs = Qwen3ForCausalLM(Qwen3Config(**(THEIR_SHAPE | {"head_dim": 16}), rope_parameters=DEFAULT_ROPE))
            return Case({"qk_norm": True, "head_dim": 16}, theirs)
        case "qwen2":
            return Case({"qkv_bias": True}, Qwen2ForCausalLM(Qwen2Config(**THEIR_SHAPE, rope_parameters=DEFAULT_ROPE)))
        case "mistral":
            theirs = MistralForCausalLM(MistralConfig(**THEIR_SHAPE, sliding_window=5, rope_parameters=DEFAULT_ROPE))
            return Case({"sliding_window": 5}, theirs)
    raise ValueError(name)


CASES = ["llama", "llama tied, multi-head", "llama yarn, multi-query", "qwen3", "qwen2", "mistral"]


def with_random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Larger than the usual initial weights, norms and biases too, so that nothing stays hidden behind a 1 or a 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.ndim == 1))
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 1:].clone()
    labels[0, 3:7] = -100
    return tokens[:, :-1], labels


def run_ours(model: Llama, kernel: str = "sdpa") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits, summed cross-entropy, gradients)."""
    ids, labels = batch()
    mask = document_mask(torch.zeros_like(ids), torch.arange(S).expand(B, S), kernel, model.config)
    loss = model.loss(ids, labels, mask).total
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model.logits(model(ids, mask)), loss, gradients


def run_theirs(model: PreTrainedModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    ids, labels = batch()
    logits = model(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    return logits, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def make_ours_with_weights_of(theirs: PreTrainedModel, changes: dict[str, object]) -> Llama:
    with torch.device("meta"):
        model = Llama(SHAPE.model_copy(update=changes))
    model.to_empty(device="cpu")
    model.load_state_dict({name: p.detach().clone() for name, p in theirs.named_parameters()}, strict=True)
    return model


@pytest.mark.parametrize("name", CASES)
def test_parameters_have_the_names_and_shapes_of_transformers(name: str) -> None:
    this = case(name)
    ours = Llama(SHAPE.model_copy(update=this.ours))
    theirs = {n: p.shape for n, p in this.theirs.named_parameters()}
    assert {n: p.shape for n, p in ours.named_parameters()} == theirs
    assert set(ours.state_dict()) == set(theirs)


@pytest.mark.parametrize("kernel", ["sdpa", "blocked"])
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_all_gradients_equal_transformers(name: str, kernel: str) -> None:
    this = case(name)
    theirs = with_random_weights(this.theirs)
    logits, loss, gradients = run_ours(make_ours_with_weights_of(theirs, this.ours), kernel)
    their_logits, their_loss, their_gradients = run_theirs(theirs)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    assert set(gradients) == set(their_gradients)
    for parameter, gradient in gradients.items():
        error = (gradient - their_gradients[parameter]).norm() / their_gradients[parameter].norm()
        assert error < 2e-5, parameter


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("llama", {"rope": RopeConfig(theta=20_000)}),
        ("llama", {"norm_eps": 1e-2}),
        ("llama yarn, multi-query", {"rope": RopeConfig()}),
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_a_wrong_setting_is_seen(name: str, wrong: dict[str, object]) -> None:
    this = case(name)
    theirs = with_random_weights(this.theirs)
    logits, _, _ = run_ours(make_ours_with_weights_of(theirs, this.ours | wrong))
    assert (logits - run_theirs(theirs)[0]).abs().max() > 1e-3


def test_heads_in_another_order_are_seen() -> None:
    theirs = with_random_weights(case("llama").theirs)
    ours = make_ours_with_weights_of(theirs, {})
    with torch.no_grad():
        key = ours.get_parameter("model.layers.0.self_attn.k_proj.weight")
        key.copy_(key.unflatten(0, (2, 8)).flip(0).flatten(0, 1))
    assert (run_ours(ours)[0] - run_theirs(theirs)[0]).abs().max() > 1e-2


def test_interleaved_rope_weights_are_seen() -> None:
    theirs = with_random_weights(case("llama").theirs)
    ours = make_ours_with_weights_of(theirs, {})
    with torch.no_grad():
        query = ours.get_parameter("model.layers.0.self_attn.q_proj.weight")
        query.copy_(query.unflatten(0, (4, 2, 4)).transpose(1, 2).flatten(0, 2))
    assert (run_ours(ours)[0] - run_theirs(theirs)[0]).abs().max() > 1e-2


def test_bf16_logits_equal_transformers_within_bf16_rounding() -> None:
    theirs = with_random_weights(case("qwen3").theirs)
    ours = make_ours_with_weights_of(theirs, case("qwen3").ours).bfloat16()
    exact = run_theirs(theirs)[0]
    rounded = run_theirs(theirs.bfloat16())[0].float()
    error = (run_ours(ours)[0].float() - exact).norm() / exact.norm()
    assert error < 1.2 * (rounded - exact).norm() / exact.norm()
