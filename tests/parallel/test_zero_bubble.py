"""The split backward pass gives the same gradients. Its first half computes none for the weights of linear layers."""

import gc

import pytest
import torch
from torch import Tensor, nn

from parallel.pipeline.zero_bubble import ZeroBubbleBackward
from parallel.recompute import apply_recompute
from pretrain.config import ModelConfig
from pretrain.model.architectures.llama import Llama
from pretrain.model.init import init_weights

V, S = 64, 24
CONFIG = ModelConfig(
    vocab_size=V, n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, d_ff=40, max_seq_len=S, qkv_bias=True, qk_norm=True
)
LINEAR = {f"{module}_proj.weight" for module in "qkvo"} | {f"{module}_proj.weight" for module in ("gate", "up", "down")}


def model() -> Llama:
    llama = Llama(CONFIG)
    init_weights(llama, seed=0)
    return llama


def first_pass(llama: Llama, microbatch: int = 0) -> float:
    ids = torch.randint(V, (2, S + 1), generator=torch.Generator().manual_seed(microbatch))
    positions = torch.arange(S).expand(2, S)
    loss = llama.loss(ids[:, :-1], ids[:, 1:], llama.document_mask(torch.zeros_like(positions), positions)).total
    loss.backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
    return float(loss.detach())


def gradients(llama: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in llama.named_parameters()}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, atol: float) -> None:
    expected = gradients(theirs)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=atol, msg=name)


def is_linear(name: str) -> bool:
    return any(name.endswith(suffix) for suffix in LINEAR)


@pytest.mark.parametrize(
    ("mode", "compiled"), [("none", False), ("full", False), ("selective", False), ("none", True), ("full", True)]
)
def test_the_split_backward_pass_gives_the_same_gradients(mode: str, compiled: bool) -> None:
    reference, split = model(), model()
    weights = ZeroBubbleBackward(split.layers)
    for layer in split.layers if compiled else ():
        # As the model does.
        layer.forward = torch.compile(layer.forward, backend="aot_eager")  # type: ignore[method-assign]
    apply_recompute(split.layers, mode, keep=("matmul",))
    assert first_pass(split) == pytest.approx(first_pass(reference), rel=1e-6)
    weights.take_weight_gradients(split)()
    assert_same_gradients(split, reference, atol=1e-7)


def test_only_linear_weights_of_blocks_are_deferred() -> None:
    split = model()
    weights = ZeroBubbleBackward(split.layers)
    first_pass(split)
    assert {name for name, gradient in gradients(split).items() if gradient is None} == {
        name for name in gradients(split) if is_linear(name)
    }
    weights.take_weight_gradients(split)()
    assert None not in gradients(split).values()


def test_deferred_microbatches_can_be_added_in_any_order() -> None:
    reference, split = model(), model()
    weights = ZeroBubbleBackward(split.layers)
    later = []
    for microbatch in range(3):
        first_pass(split, microbatch)
        first_pass(reference, microbatch)
        later.append(weights.take_weight_gradients(split))
    for add in reversed(later):
        add()
    assert_same_gradients(split, reference, atol=1e-6)


def test_deferred_tensors_are_freed_when_added() -> None:
    split = model()
    weights = ZeroBubbleBackward(split.layers)
    first_pass(split)
    add = weights.take_weight_gradients(split)
    kept = tensors_of(S * 2, CONFIG.d_ff)
    add()
    assert kept >= 3 * CONFIG.n_layers  # gate's and up's gradients, and the input of down
    assert tensors_of(S * 2, CONFIG.d_ff) == 0


def tensors_of(rows: int, columns: int) -> int:
    gc.collect()
    return sum(
        type(it) is Tensor and it.numel() == rows * columns and it.shape[-1] == columns for it in gc.get_objects()
    )


def test_names_and_state_are_those_of_plain_linear_layers() -> None:
    split = model()
    ZeroBubbleBackward(split.layers)
    assert list(split.state_dict()) == list(model().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(split.parameters(), model().parameters(), strict=True))


def test_an_interrupted_step_leaves_nothing() -> None:
    split = model()
    weights = ZeroBubbleBackward(split.layers)
    first_pass(split)
    weights.begin_step()
    weights.take_weight_gradients(split)()
    assert all(gradient is None for name, gradient in gradients(split).items() if is_linear(name))
