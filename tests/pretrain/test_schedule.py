import math
from itertools import pairwise

import pytest

from pretrain.config import OptimConfig, TrainConfig
from pretrain.errors import UserError
from pretrain.optim.schedule import WSD_DECAY, batch_size_at, check, lr_scale, samples_before, wsd_decay_steps

STEPS = 1000
SHAPES = [
    ("cosine", "linear"),
    ("linear", "linear"),
    ("inverse_sqrt", "linear"),
    ("constant", "linear"),
    ("wsd", "linear"),
    ("wsd", "sqrt"),
    ("wsd", "cosine"),
]


def optim(schedule="cosine", decay_shape="linear", **settings):
    return OptimConfig(
        schedule=schedule,
        decay_shape=decay_shape,
        **{"warmup": 100, "decay": WSD_DECAY, "min_lr_ratio": 0.1} | settings,
    )


def scales(config, steps=STEPS):
    return [lr_scale(step, steps, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize(("schedule", "decay_shape"), SHAPES)
def test_warmup_rises_linearly_to_the_peak(schedule, decay_shape):
    warm = scales(optim(schedule, decay_shape))[:100]
    assert warm == [step / 100 for step in range(1, 101)]


@pytest.mark.parametrize(("schedule", "decay_shape"), SHAPES)
def test_the_schedule_never_rises_after_the_warmup_and_has_no_jump(schedule, decay_shape):
    after = scales(optim(schedule, decay_shape))[99:]
    falls = [before - now for before, now in pairwise(after)]
    assert min(falls) >= 0
    largest = 0.9 * math.sqrt(1 / 200) if decay_shape == "sqrt" else 0.01  # 1 - sqrt(p) starts with its steepest step
    assert max(falls) <= largest


@pytest.mark.parametrize(
    ("schedule", "decay_shape", "middle_step", "middle", "end"),
    [
        ("cosine", "linear", 550, 0.1 + 0.9 * 0.5, 0.1),
        ("linear", "linear", 550, 0.1 + 0.9 * 0.5, 0.1),
        ("inverse_sqrt", "linear", 400, 0.5, math.sqrt(0.1)),
        ("wsd", "linear", 900, 0.1 + 0.9 * 0.5, 0.1),
        ("wsd", "sqrt", 850, 0.1 + 0.9 * 0.5, 0.1),
        ("wsd", "cosine", 900, 0.1 + 0.9 * 0.5, 0.1),
    ],
)
def test_middle_and_end_of_each_schedule(schedule, decay_shape, middle_step, middle, end):
    config = optim(schedule, decay_shape)
    assert lr_scale(middle_step, STEPS, config) == pytest.approx(middle, rel=1e-12)
    assert lr_scale(STEPS, STEPS, config) == pytest.approx(end, rel=1e-12)


def test_the_shapes_differ_where_they_should():
    """Negative control of the table above: at a quarter of the decay no two shapes agree."""
    at_quarter = [lr_scale(850, STEPS, optim("wsd", shape)) for shape in ("linear", "sqrt", "cosine")]
    assert at_quarter == pytest.approx([0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1 + 0.45 * (1 + math.sqrt(0.5))])


def test_wsd_stays_at_the_peak_until_the_last_fifth():
    values = scales(optim("wsd"))
    assert set(values[99:800]) == {1.0}
    assert values[800] < 1.0


def test_wsd_without_decay_stays_at_the_peak_to_the_end():
    assert scales(optim("wsd", decay=0.0))[99:] == [1.0] * 901


def test_constant_stays_at_the_peak_to_the_end():
    assert scales(optim("constant"))[99:] == [1.0] * 901


def test_a_tiny_decay_is_still_one_step():
    assert wsd_decay_steps(10, optim("wsd", decay=0.01)) == 1
    assert lr_scale(10, 10, optim("wsd", decay=0.01, warmup=0)) == 0.1


def test_inverse_sqrt_does_not_fall_below_the_floor():
    assert lr_scale(STEPS, STEPS, optim("inverse_sqrt", min_lr_ratio=0.4)) == 0.4


def test_without_warmup_the_first_step_is_the_first_of_the_decay():
    assert lr_scale(1, 10, optim("linear", warmup=0, min_lr_ratio=0.0)) == pytest.approx(0.9)
    assert lr_scale(1, 10, optim("inverse_sqrt", warmup=0)) == 1.0


@pytest.mark.parametrize("step", [0, 1001])
def test_steps_outside_the_run_are_refused(step):
    with pytest.raises(ValueError, match="outside the run of 1000 steps"):
        lr_scale(step, STEPS, optim())


def train(**settings):
    return TrainConfig(**{"steps": 100, "batch_size": 32} | settings)


def test_without_a_ramp_every_batch_is_full():
    assert [batch_size_at(step, train()) for step in (1, 2, 100)] == [32, 32, 32]
    assert [samples_before(step, train()) for step in (1, 2, 101)] == [0, 32, 3200]


def test_the_ramp_grows_linearly_and_ends_at_the_full_batch():
    ramp = train(batch_ramp_steps=8, batch_ramp_start=4, batch_size=20)
    assert [batch_size_at(step, ramp) for step in range(1, 11)] == [4, 6, 8, 10, 12, 14, 16, 18, 20, 20]


@pytest.mark.parametrize(
    ("start", "size", "ramp_steps"), [(1, 32, 7), (4, 512, 97), (3, 5, 100), (5, 5, 10), (1, 2, 1), (2, 1025, 64)]
)
def test_samples_before_a_step_is_the_sum_of_the_batches_before_it(start, size, ramp_steps):
    ramp = train(batch_ramp_steps=ramp_steps, batch_ramp_start=start, batch_size=size)
    consumed = 0
    for step in range(1, 131):
        assert samples_before(step, ramp) == consumed
        consumed += batch_size_at(step, ramp)


def test_samples_before_a_late_step_of_a_long_ramp_is_exact():
    ramp = train(steps=10**9, batch_ramp_steps=10**9, batch_ramp_start=1, batch_size=10**9 + 1)
    assert samples_before(10**9 + 1, ramp) == 10**9 * (10**9 + 1) // 2


@pytest.mark.parametrize(
    ("optim_settings", "train_settings", "message"),
    [
        ({"warmup": 100}, {}, r"optim\.warmup=100 is not below train\.steps=100.*optim\.warmup=10"),
        (
            {"schedule": "wsd", "warmup": 81},
            {},
            r"optim\.warmup=81 and optim\.decay=0\.2 \(20 steps\).*optim\.warmup=80",
        ),
        ({"warmup": 1}, {"batch_ramp_steps": 101}, r"train\.batch_ramp_steps=101 is longer than train\.steps=100"),
        (
            {"warmup": 1},
            {"batch_ramp_steps": 9, "batch_ramp_start": 33},
            r"train\.batch_ramp_start=33 is above train\.batch_size=32",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(optim_settings, train_settings, message):
    with pytest.raises(UserError, match=message):
        check(optim(**optim_settings), train(**train_settings))


@pytest.mark.parametrize("settings", [{"warmup": 99}, {"schedule": "wsd", "warmup": 80}, {"warmup": 0}])
def test_settings_at_the_edge_are_accepted(settings):
    check(optim(**settings), train(batch_ramp_steps=100))
