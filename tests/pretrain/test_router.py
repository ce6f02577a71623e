"""The router's losses at their extremes, what a capacity drops, and noise that depends on row, layer and token only."""

from typing import Any

import pytest
import torch
from moe_reference import D, make_layer, mask_of, model_config
from torch import Tensor

from pretrain.model.moe.capacity import capacity, drop_overflow
from pretrain.model.moe.layer import MoE
from pretrain.model.moe.router import Router
from pretrain.model.moe.rows import PADDING, row_keys, uniform

B, S, E = 4, 64, 8
SEED = 5


def statistics(router: Router, x_BSD: Tensor) -> Tensor:
    """[E + 4]: counts, weighted auxiliary loss, weighted z-loss, entropy, dropped assignments."""
    with torch.no_grad():
        router(x_BSD, None)
    return router.take_sums()


@pytest.mark.parametrize("scope", ["sequence", "microbatch", "global_batch"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_auxiliary_loss_is_1_at_perfect_balance_and_the_number_of_experts_if_one_gets_all(
    scope: str, top_k: int
) -> None:
    """With k choices of equal scores f and P are 1/k for k experts, so the loss is E / k."""
    router = make_layer(model_config(top_k=top_k, aux_loss=0.01, aux_loss_scope=scope)).gate
    x_BSD = torch.ones(B, S, D)
    with torch.no_grad():
        router.weight.zero_()
        router.expert_load.fill_(1 / E)
    even = statistics(router, x_BSD)
    assert even[E].item() == pytest.approx(0.01 * B * S, rel=1e-6)
    assert even[E + 2].item() == pytest.approx(B * S * torch.tensor(E).log().item(), rel=1e-6)  # entropy log E
    with torch.no_grad():
        router.weight[:top_k] = 3.0
    router.end_step(statistics(router, x_BSD))
    collapsed = statistics(router, x_BSD)
    assert collapsed[:E].tolist() == [B * S] * top_k + [0] * (E - top_k)
    assert collapsed[E].item() == pytest.approx(0.01 * B * S * E / top_k, rel=1e-6)
    assert collapsed[E + 2].item() == pytest.approx(B * S * torch.tensor(top_k).log().item(), abs=1e-5 * B * S)


def test_the_z_loss_is_the_mean_squared_log_sum_exp() -> None:
    router = make_layer(model_config(router_z_loss=1e-3, aux_loss=0.0)).gate
    with torch.no_grad():
        router.weight.fill_(0.5)
    z = 0.5 * D + torch.tensor(E).log().item()  # every logit is D / 2
    assert statistics(router, torch.ones(B, S, D))[E + 1].item() == pytest.approx(1e-3 * z**2 * B * S, rel=1e-6)


@pytest.mark.parametrize("policy", ["score", "position"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 2.0])
def test_the_fraction_dropped_is_what_each_expert_has_beyond_its_capacity(policy: str, factor: float) -> None:
    """p_drop = sum over experts of max(0, f_i - capacity_factor / n_experts), f_i the fraction of all assignments."""
    moe = model_config(top_k=1, capacity_factor=factor, drop_policy=policy).moe
    counts = torch.tensor([40, 12, 8, 2, 1, 1, 0, 0])
    row = torch.repeat_interleave(torch.arange(E), counts)[torch.randperm(S)]
    kept = drop_overflow(row[None, :, None], torch.rand(1, S, 1), moe)
    expected = (counts / S - factor / E).clamp(min=0).sum().item()
    assert (kept == E).sum().item() / S == expected
    assert torch.equal(kept[kept < E], row[(kept < E).flatten()])


def test_an_expert_keeps_the_best_or_the_first() -> None:
    expert_BRK = torch.tensor([[0, 1, 0, 0, 1, 0]])[..., None]
    weight_BRK = torch.tensor([[0.3, 0.1, 0.9, 0.2, 0.8, 0.5]])[..., None]
    by = {
        policy: drop_overflow(
            expert_BRK, weight_BRK, model_config(n_experts=2, top_k=1, capacity_factor=0.6, drop_policy=policy).moe
        ).flatten().tolist()
        for policy in ("score", "position")
    }  # fmt: skip
    assert by == {"score": [2, 1, 0, 2, 1, 0], "position": [0, 1, 0, 2, 1, 2]}


@pytest.mark.parametrize(("factor", "row_len", "expected"), [(1.1, 10, 11), (1.0, 10, 10), (1.01, 10, 11), (0.1, 3, 1)])
def test_capacity_is_rounded_up_but_not_past_a_whole_number(factor: float, row_len: int, expected: int) -> None:
    moe = model_config(n_experts=10, top_k=10, capacity_factor=factor).moe
    assert capacity(moe, row_len) == expected


def jittered(layer: int = 0, seed: int = SEED, rows: range = range(B)) -> Tensor:
    """[B, S, E], the noise that each feature of each token is multiplied by, which a router lets one see."""
    config = model_config(
        n_experts=D, top_k=D, score_function="sigmoid", normalize_top_k=False, input_jitter=0.1, aux_loss=0.0
    )
    router = Router(config, layer)
    with torch.no_grad():
        router.weight.copy_(torch.eye(D))
    routing = router(torch.ones(len(rows), S, D), row_keys(torch.tensor(rows), seed))
    by_expert = routing.expert_TK.argsort(1)
    return routing.weight_TK.detach().gather(1, by_expert).logit().view(len(rows), S, D)


def dropped_features(layer: int = 0, seed: int = SEED, rows: range = range(B)) -> Tensor:
    """[B, S, F], 0 where dropout of 0.4 has dropped a hidden feature, else its factor."""
    return hidden_features(expert_layer(layer, expert_dropout=0.4), row_keys(torch.tensor(rows), seed))


def expert_layer(layer: int, **more: object) -> MoE:
    """A layer of one choice whose output shows the hidden features of the chosen expert, all 1 without dropout."""
    moe = MoE(model_config(d_ff=D, top_k=1, aux_loss=0.0, normalize_top_k=False, **more), layer)
    with torch.no_grad():
        moe.gate.weight.normal_(generator=torch.Generator().manual_seed(2))
        silu_of_1 = torch.nn.functional.silu(torch.ones(()))
        moe.experts.gate_up_proj.fill_(1 / D)
        moe.experts.gate_up_proj[:, D:] /= silu_of_1
        moe.experts.down_proj.copy_(torch.eye(D).expand(E, -1, -1))
    return moe


def hidden_features(moe: MoE, keys: Tensor) -> Tensor:
    x_BSD = torch.ones(len(keys), S, D)
    weight_BS1 = moe.gate(x_BSD, keys).weight_TK.view(len(keys), S, 1)
    out_BSD: Tensor = moe(x_BSD, mask_of(keys)) / weight_BS1
    return out_BSD.detach()


NOISE = {"input jitter": jittered, "expert dropout": dropped_features}


def test_jitter_is_uniform_around_1() -> None:
    noise = jittered()
    assert 0.9 <= noise.min() < 0.902
    assert 1.098 < noise.max() <= 1.1
    # 4,096 numbers of variance 0.2^2 / 12: their mean has a standard deviation of 9e-4, that of the deviation is 4e-4
    assert noise.mean().item() == pytest.approx(1, abs=4e-3)
    assert noise.std().item() == pytest.approx(0.2 / 12**0.5, abs=2e-3)


def test_expert_dropout_drops_that_fraction_and_scales_the_rest() -> None:
    features = dropped_features()
    dropped = features == 0
    torch.testing.assert_close(features[~dropped], torch.full_like(features[~dropped], 1 / 0.6))
    assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.031)  # four standard deviations of 4,096 draws


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_noise_depends_on_seed_row_layer_and_token_and_on_nothing_else(noise: Any) -> None:
    one = noise()
    assert torch.equal(noise(), one)
    parts = torch.cat([noise(rows=range(1)), noise(rows=range(1, 4))])
    assert torch.equal(parts, one)  # another microbatch size
    for other in (noise(layer=1), noise(seed=SEED + 1), noise(rows=range(B, 2 * B))):  # the rows of the next step
        assert correlation(one, other) < 0.07  # four standard deviations of 4,096 draws are 0.0625
    assert correlation(one[:, 1:], one[:, :-1]) < 0.07  # neighbouring tokens
    assert correlation(one[1:], one[:-1]) < 0.075  # neighbouring rows
    assert correlation(one[..., 1:], one[..., :-1]) < 0.07  # neighbouring features


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def test_two_experts_of_a_token_drop_different_features() -> None:
    moe = expert_layer(0, expert_dropout=0.4)
    keys = row_keys(torch.arange(B), SEED)
    first = hidden_features(moe, keys)
    with torch.no_grad():
        moe.gate.weight.neg_()
    assert correlation(first, hidden_features(moe, keys)) < 0.07


def test_noise_is_off_in_evaluation() -> None:
    config = model_config(input_jitter=0.5, expert_dropout=0.5)
    noisy, quiet = make_layer(config), make_layer(model_config())
    x_BSD, mask = torch.randn(B, S, D), mask_of(row_keys(torch.arange(B), SEED))
    with torch.no_grad():
        assert torch.equal(noisy(x_BSD, mask), quiet(x_BSD, mask))
    assert not torch.equal(noisy(x_BSD, mask), quiet(x_BSD, mask))


def test_padding_rows_keep_their_mark_and_other_rows_never_get_it() -> None:
    keys = row_keys(torch.tensor([0, PADDING, 1, 2**40]), SEED)
    assert (keys == PADDING).tolist() == [False, True, False, False]
    assert (row_keys(torch.arange(10_000), SEED) >= 0).all()
    assert len(row_keys(torch.arange(10_000), SEED).unique()) == 10_000


def test_uniform_numbers_fill_their_range_evenly() -> None:
    numbers = uniform(torch.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    assert (counts - 5000).abs().max() < 300  # a bin's standard deviation is 69
