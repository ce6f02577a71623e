"""Promises of the model as a whole: packing, micro-batches, building on meta, tracing, errors."""

import pytest
import torch
from torch import Tensor

from pretrain.config import ModelConfig, RopeConfig
from pretrain.model.architectures.llama import Llama
from pretrain.model.attention import document_mask
from pretrain.model.init import init_weights

V, S = 64, 32
LENGTHS = (9, 1, 22)
TINY = ModelConfig(vocab_size=V, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=64, init_std=0.3)
CONFIGS = {
    "plain": TINY,
    "window": TINY.model_copy(update={"sliding_window": 4}),
    "qk norm, biases": TINY.model_copy(update={"qk_norm": True, "qkv_bias": True}),
    "dynamic ntk": TINY.model_copy(update={"rope": RopeConfig(kind="dynamic_ntk", factor=4, original_max_seq_len=8)}),
}


def make_model(config: ModelConfig, kernel: str = "sdpa") -> Llama:
    model = Llama(config, kernel)
    init_weights(model, seed=0)
    return model


def tokens() -> Tensor:
    return torch.randint(V, (1, S + 1), generator=torch.Generator().manual_seed(0))


def packed_row() -> tuple[Tensor, Tensor]:
    """(document ids, positions) of one row that holds three documents."""
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
    return ids, torch.cat([torch.arange(n) for n in LENGTHS])[None]


def copy_gradients(model: Llama) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def add_loss(model: Llama, ids: Tensor, labels: Tensor, documents: Tensor, positions: Tensor) -> float:
    sums = model.loss(ids, labels, model.document_mask(documents, positions), z_loss=0.01)
    sums.total.backward()  # type: ignore[no-untyped-call]  # torch does not type backward()
    return sums.total.item()


@pytest.mark.parametrize("kernel", ["sdpa", "blocked"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_separate_runs_of_each(name: str, kernel: str) -> None:
    model, (ids, labels) = make_model(CONFIGS[name], kernel), (tokens()[:, :-1], tokens()[:, 1:])
    together = add_loss(model, ids, labels, *packed_row())
    packed = copy_gradients(model)
    model.zero_grad()
    apart = 0.0
    for x, y in zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        apart += add_loss(model, x, y, torch.zeros_like(x), torch.arange(x.shape[1])[None])
    assert together == pytest.approx(apart, rel=1e-6)
    for parameter, gradient in copy_gradients(model).items():
        torch.testing.assert_close(
            packed[parameter], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=parameter
        )


def test_without_the_document_mask_they_do_not() -> None:
    ids, labels = tokens()[:, :-1], tokens()[:, 1:]
    masked = add_loss(make_model(TINY), ids, labels, *packed_row())
    open_ = add_loss(make_model(TINY.model_copy(update={"document_mask": False})), ids, labels, *packed_row())
    assert abs(masked - open_) / masked > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_two_micro_batches_equal_one_batch(name: str) -> None:
    model = make_model(CONFIGS[name])
    both = torch.randint(V, (2, S + 1), generator=torch.Generator().manual_seed(1))
    documents, positions = (
        torch.cat([packed, whole])
        for packed, whole in zip(packed_row(), (torch.zeros(1, S), torch.arange(S)[None]), strict=True)
    )
    whole = add_loss(model, both[:, :-1], both[:, 1:], documents, positions)
    expected = copy_gradients(model)
    model.zero_grad()
    halves = sum(
        add_loss(model, both[i : i + 1, :-1], both[i : i + 1, 1:], documents[i : i + 1], positions[i : i + 1])
        for i in (0, 1)
    )
    assert halves == pytest.approx(whole, rel=1e-6)
    for parameter, gradient in copy_gradients(model).items():
        torch.testing.assert_close(
            gradient, expected[parameter], rtol=1e-4, atol=1e-4 * float(gradient.abs().max()), msg=parameter
        )


def test_a_token_changes_nothing_before_it() -> None:
    model, ids = make_model(TINY), tokens()[:, :-1]
    mask = model.document_mask(*packed_row())
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % V
    difference = (model(changed, mask) - model(ids, mask)).abs().amax(-1)[0]
    assert difference[:20].max() == 0
    assert difference[20:].min() > 0


@pytest.mark.parametrize("kernel", ["sdpa", "blocked"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_traces_without_a_graph_break_forward_and_backward(kernel: str, packed: bool) -> None:
    ids, labels = tokens()[:, :-1], tokens()[:, 1:]
    documents, positions = packed_row() if packed else (torch.zeros_like(ids), torch.arange(S)[None])
    eager, traced = make_model(TINY, kernel), make_model(TINY, kernel)
    for layer in traced.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert add_loss(traced, ids, labels, documents, positions) == pytest.approx(
        add_loss(eager, ids, labels, documents, positions), rel=1e-6
    )
    for name, gradient in copy_gradients(traced).items():
        torch.testing.assert_close(
            gradient, copy_gradients(eager)[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name
        )


def test_a_model_on_meta_takes_no_memory_and_traces_shapes() -> None:
    with torch.device("meta"):
        model = Llama(TINY)
        ids = torch.zeros(2, S, dtype=torch.long)
        zeros, positions = torch.zeros_like(ids, device="cpu"), torch.arange(S, device="cpu").expand(2, S)
    assert all(p.is_meta for p in model.parameters())
    mask = document_mask(zeros, positions, "sdpa", TINY).to("meta")
    assert model.logits(model(ids, mask)).shape == (2, S, V)


def test_an_unresolved_vocabulary_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size=auto"):
        Llama(ModelConfig())


def test_tied_embeddings_are_one_parameter_that_learns_from_both_ends() -> None:
    tied = make_model(TINY.model_copy(update={"tie_embeddings": True}))
    assert tied.output_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    ids, labels = torch.full((1, S), 3), torch.full((1, S), 5)
    add_loss(tied, ids, labels, torch.zeros_like(ids), torch.arange(S)[None])
    gradient = copy_gradients(tied)["model.embed_tokens.weight"]
    assert bool((gradient != 0).any(-1).all())  # the output end reaches every row
    untied = make_model(TINY)
    add_loss(untied, ids, labels, torch.zeros_like(ids), torch.arange(S)[None])
    assert (copy_gradients(untied)["model.embed_tokens.weight"] != 0).any(-1).nonzero().flatten().tolist() == [3]
