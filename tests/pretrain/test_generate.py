"""Generation: the cache changes nothing, sampling obeys its settings, the stream stops where it should."""

import pytest
import torch

from pretrain.config import ModelConfig, RopeConfig
from pretrain.config.model import MoeConfig
from pretrain.inference.generate import generate, next_token_logits, sample
from pretrain.model.architectures.llama import Llama
from pretrain.model.architectures.moe import MoETransformer
from pretrain.model.init import init_weights
from pretrain.model.kv_cache import KVCache
from pretrain.model.transformer import Transformer

V = 50
TINY = ModelConfig(vocab_size=V, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=40, init_std=0.3)
PROMPT = [3, 14, 15, 9, 2, 6]


def make_model(config: ModelConfig = TINY) -> Transformer:
    model = MoETransformer(config) if config.moe.n_experts else Llama(config)
    init_weights(model, seed=0)
    return model


def logits_without_cache(model: Transformer, ids: list[int]) -> torch.Tensor:
    row = torch.tensor([ids])
    mask = model.document_mask(torch.zeros_like(row), torch.arange(len(ids))[None])
    with torch.no_grad():
        return model.logits(model(row, mask))[0]


EXPERTS = {
    "dense": MoeConfig(),
    "experts": MoeConfig(n_experts=5, top_k=2),
    "sigmoid, bias, groups, shared, first layer dense": MoeConfig(
        n_experts=8,
        top_k=3,
        d_ff=16,
        score_function="sigmoid",
        expert_bias=True,
        n_groups=4,
        top_k_groups=2,
        n_shared_experts=2,
        n_dense_layers=1,
    ),
}


@pytest.mark.parametrize(("moe", "window"), [(moe, None) for moe in EXPERTS] + [("dense", 4)])
@pytest.mark.parametrize("chunks", [(1,) * 20, (12,) + (1,) * 8, (5, 7, 8), (20,)], ids=str)
def test_cached_and_uncached_logits_agree_to_1e5(chunks: tuple[int, ...], moe: str, window: int | None) -> None:
    tree = TINY.model_dump() | {"sliding_window": window, "moe": EXPERTS[moe].model_dump()}
    model = make_model(ModelConfig.model_validate(tree | {"architecture": "llama" if moe == "dense" else "moe"}))
    ids = torch.randint(V, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    uncached = logits_without_cache(model, ids)
    cache = KVCache(model.config, 1, 20, torch.device("cpu"), torch.float32)
    done = 0
    for count in chunks:
        cached = next_token_logits(model, ids[done : done + count], cache)
        done += count
        torch.testing.assert_close(cached, uncached[done - 1], rtol=1e-5, atol=1e-5)
    assert cache.length == 20


def test_dynamic_ntk_scales_once_for_the_whole_cache() -> None:
    model = make_model(
        TINY.model_copy(update={"rope": RopeConfig(kind="dynamic_ntk", factor=4, original_max_seq_len=8)})
    )
    ids = torch.randint(V, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = KVCache(model.config, 1, 20, torch.device("cpu"), torch.float32)
    for token in ids:
        cached = next_token_logits(model, [token], cache)
    torch.testing.assert_close(cached, logits_without_cache(model, ids)[-1], rtol=1e-5, atol=1e-5)


def test_greedy_text_is_the_likeliest_token_each_time() -> None:
    model, ids = make_model(), list(PROMPT)
    for token in generate(model, PROMPT, 8, temperature=0):
        assert token == int(logits_without_cache(model, ids)[-1].argmax())
        ids.append(token)
    assert len(ids) == len(PROMPT) + 8


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = make_model()
    texts = [list(generate(model, PROMPT, 12, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_global_generator_is_left_alone() -> None:
    model, before = make_model(), torch.get_rng_state()
    list(generate(model, PROMPT, 4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_text_stops_before_the_end_of_text_token() -> None:
    model = make_model()
    text = list(generate(model, PROMPT, 12, seed=1))
    assert list(generate(model, PROMPT, 12, seed=1, eot_id=text[5])) == text[: text.index(text[5])]


def test_tokens_come_one_at_a_time() -> None:
    stream = generate(make_model(), PROMPT, 12, seed=1)
    assert isinstance(next(stream), int)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"temperature": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_k": 2}, {0, 1}),
        ({"temperature": 1.0, "top_p": 0.7}, {0, 1}),
        ({"temperature": 1.0, "top_p": 0.4}, {0}),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8}, {0, 1}),
        ({"temperature": 0.0}, {0}),
    ],
)
def test_sampling_draws_from_the_tokens_it_may(settings: dict[str, float], allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    top_k = int(settings["top_k"]) if "top_k" in settings else None
    drawn = [sample(logits, settings["temperature"], top_k, settings.get("top_p"), generator) for _ in range(300)]
    assert set(drawn) == allowed


def test_a_low_temperature_sharpens() -> None:
    logits = torch.tensor([0.6, 0.4]).log()
    generator = torch.Generator().manual_seed(0)
    share = [sum(sample(logits, t, None, None, generator) == 0 for _ in range(2000)) / 2000 for t in (1.0, 0.5)]
    assert share[0] == pytest.approx(0.6, abs=0.04)
    assert share[1] == pytest.approx(0.36 / 0.52, abs=0.04)


def test_a_prompt_that_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(ValueError, match=r"6 tokens and max_new_tokens=40 exceed model.max_seq_len=40"):
        next(generate(make_model(), PROMPT, 40))
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(make_model(), [], 4))


def test_compiled_blocks_generate_without_being_compiled_again() -> None:
    model = make_model()
    expected = list(generate(model, PROMPT, 6, seed=1))
    compiled = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal compiled
        compiled += 1
        return graph

    for layer in model.layers:
        layer.compile(backend=count)
    assert list(generate(model, PROMPT, 6, seed=1)) == expected
    assert compiled == 0


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    free = list(generate(make_model(), PROMPT, max_new_tokens=30))
    bounded = list(generate(make_model(), PROMPT, max_new_tokens=30, n_ids=10))
    assert max(free) >= 10  # negative control: without the bound they are
    assert len(bounded) == 30
    assert max(bounded) < 10
