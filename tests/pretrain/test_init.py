"""Initial weights depend only on the seed and on the parameter's name and shape, whichever rank draws which shard."""

import math
import tracemalloc
from hashlib import blake2b

import numpy as np
import pytest
import torch

from pretrain.config import ModelConfig
from pretrain.model import init
from pretrain.model.architectures.llama import Llama
from pretrain.model.init import COLUMNS, ROWS, init_shard, init_weights
from pretrain.model.spec import architecture_of

CONFIG = ModelConfig(
    vocab_size=3 * ROWS + 10,
    n_layers=2,
    d_model=64,
    n_heads=4,
    n_kv_heads=2,
    d_ff=96,
    max_seq_len=64,
    qkv_bias=True,
    qk_norm=True,
)
NAME, SHAPE = "model.layers.1.mlp.gate_proj.weight", (3 * ROWS + 10, 2 * COLUMNS + 30)


def weights(config: ModelConfig = CONFIG, seed: int = 7, *, meta: bool = False) -> dict[str, torch.Tensor]:
    with torch.device("meta" if meta else "cpu"):
        model = Llama(config)
    if meta:
        model.to_empty(device="cpu")
    init_weights(model, seed)
    return model.state_dict()


def shard(rows: tuple[int, int], columns: tuple[int, int], shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    """The values of rows [first, end) and columns [first, end)."""
    part = torch.full((rows[1] - rows[0], columns[1] - columns[0]), torch.nan)
    init_shard(NAME, part, (rows[0], columns[0]), shape, CONFIG, seed=7)
    return part


def test_meta_and_cpu_builds_get_the_same_weights_to_the_last_bit() -> None:
    built, materialised = weights(), weights(meta=True)
    assert all(torch.equal(built[name], materialised[name]) for name in built)


def test_a_deeper_model_keeps_the_weights_it_shares() -> None:
    shallow, deep = weights(), weights(CONFIG.model_copy(update={"n_layers": 8}))
    for name, value in shallow.items():
        scale = math.sqrt(2 / 8) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(deep[name], value * scale)


def test_the_layers_of_a_stage_get_the_weights_that_they_have_in_the_whole_model() -> None:
    whole = weights()
    stage = Llama(CONFIG, layers=range(1, 2))
    init_weights(stage, 7)
    assert len(stage.state_dict()) > 10
    assert all(torch.equal(value, whole[name]) for name, value in stage.state_dict().items())


@pytest.mark.parametrize("rows", [(0, ROWS), (1, 2), (ROWS - 1, ROWS + 1), (70, 3 * ROWS + 10), (SHAPE[0], SHAPE[0])])
@pytest.mark.parametrize(
    "columns", [(0, COLUMNS), (5, 6), (COLUMNS - 1, COLUMNS + 1), (1000, 2 * COLUMNS + 30), (9, 9)]
)
def test_a_shard_has_the_values_of_the_full_matrix_to_the_last_bit(
    rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    whole = shard((0, SHAPE[0]), (0, SHAPE[1]))
    assert torch.equal(shard(rows, columns), whole[slice(*rows), slice(*columns)])


def test_one_stream_a_shard_instead_of_one_a_tile_would_not_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shard((0, SHAPE[0]), (0, SHAPE[1]))
    drawn = iter([torch.randn(ROWS, COLUMNS).numpy() for _ in range(20)])
    monkeypatch.setattr(init._Tile, "draw", lambda *_: next(drawn))
    assert not torch.equal(shard((0, 64), (0, 64)), whole[:64, :64])


STACK = (3, ROWS + 10, COLUMNS + 30)


@pytest.mark.parametrize("experts", [(0, 3), (1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("rows", [(0, ROWS + 10), (ROWS - 1, ROWS + 1)])
@pytest.mark.parametrize("columns", [(0, COLUMNS + 30), (1000, COLUMNS + 1), (7, 7)])
def test_a_box_of_stacked_experts_has_the_values_that_each_expert_has_alone(
    experts: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    box = torch.full(tuple(end - first for first, end in (experts, rows, columns)), torch.nan)
    init_shard(NAME, box, (experts[0], rows[0], columns[0]), STACK, CONFIG, seed=7)
    for i, expert in enumerate(range(*experts)):
        alone = torch.full(STACK[1:], torch.nan)
        _, spec = architecture_of(CONFIG).find(NAME)
        tiles = [init._Tile(row, column) for row in (0, ROWS) for column in (0, COLUMNS)]
        for tile in tiles:
            values = torch.from_numpy(tile.draw(init._key(f"7/{NAME}/{expert}"), STACK[1:])) * spec.initial.std(CONFIG)
            alone[tile.row : tile.row + ROWS, tile.column : tile.column + COLUMNS] = values
        assert torch.equal(box[i], alone[slice(*rows), slice(*columns)])


def test_no_two_experts_share_numbers_with_each_other_or_with_the_matrix_of_that_name() -> None:
    stack, matrix = torch.empty(STACK), torch.empty(STACK[1:])
    init_shard(NAME, stack, (0, 0, 0), STACK, CONFIG, seed=7)
    init_shard(NAME, matrix, (0, 0), STACK[1:], CONFIG, seed=7)
    correlations = torch.corrcoef(torch.stack([*stack, matrix]).flatten(1)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.02  # of 78,000 independent numbers: 0.004 is one standard deviation


def test_the_bits_of_matrices_are_those_of_earlier_versions() -> None:
    part = shard((ROWS - 2, ROWS + 2), (COLUMNS - 2, COLUMNS + 2))
    assert blake2b(part.numpy().tobytes(), digest_size=8).hexdigest() == "20de02fb466e2c09"


def test_drawing_a_shard_takes_the_memory_of_a_tile() -> None:
    part = torch.empty(1024, 2048)
    init_shard(NAME, part[:64, :64], (0, 0), (4096, 4096), CONFIG, seed=7)  # what is imported late is not counted

    def peak_of(part: torch.Tensor) -> int:
        tracemalloc.start()
        init_shard(NAME, part, (1024, 2048), (4096, 4096), CONFIG, seed=7)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    tile = ROWS * COLUMNS * np.dtype(np.float32).itemsize
    assert tile < peak_of(part) < 2 * tile  # the next tile is drawn before the last one is forgotten
    assert peak_of(part[:8, :8]) < 2 * tile


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 0.02),
        ("lm_head.weight", 0.02),
        ("model.layers.0.mlp.gate_proj.weight", 0.02),
        ("model.layers.1.self_attn.o_proj.weight", 0.01),
        ("model.layers.1.mlp.down_proj.weight", 0.01),
    ],
)
def test_matrices_are_normal_and_those_into_the_residual_stream_smaller(name: str, std: float) -> None:
    values = weights()[name]
    assert values.std().item() == pytest.approx(std, rel=0.05)
    assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel())
    assert (values.abs() < std).float().mean().item() == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.03)


def test_norms_are_1_and_biases_0() -> None:
    for name, value in weights().items():
        if value.ndim == 1:
            assert torch.equal(value, torch.full_like(value, 0.0 if name.endswith("bias") else 1.0)), name


def test_no_two_matrices_layers_tiles_or_seeds_share_numbers() -> None:
    first, other = weights(), weights(seed=8)
    rows = [value[0, :16] for value in (*first.values(), *other.values()) if value.ndim == 2]
    whole = shard((0, SHAPE[0]), (0, SHAPE[1]))
    rows += [whole[row, column : column + 16] for row in (0, ROWS, 2 * ROWS) for column in (0, COLUMNS, 2 * COLUMNS)][
        1:
    ]
    correlations = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.999


def test_bf16_weights_are_the_fp32_ones_rounded() -> None:
    model = Llama(CONFIG).bfloat16()
    init_weights(model, 7)
    assert all(torch.equal(value, weights()[name].bfloat16()) for name, value in list(model.state_dict().items())[:3])


def test_a_model_fresh_from_meta_computes_what_one_built_on_cpu_does() -> None:
    with torch.device("meta"):
        materialised = Llama(CONFIG)
    materialised.to_empty(device="cpu")
    built = Llama(CONFIG)
    for model in (materialised, built):
        init_weights(model, 7)
    ids = torch.arange(20)[None]
    mask = built.document_mask(torch.zeros_like(ids), ids)
    assert torch.equal(materialised(ids, mask), built(ids, mask))
