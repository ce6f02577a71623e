"""The rank grid: unique coordinates, consecutive ranks in `tensor`, data ranks, FSDP ranks, folded expert axes."""

import doctest
from itertools import product

import pytest

from parallel import layout
from parallel.layout import AXES, EXPERT_AXES, Layout
from parallel.pipeline import schedule

GRID = Layout(pipeline=2, replicate=3, shard=2, context=2, tensor=4)


def test_coordinates_are_unique_and_the_last_axis_varies_fastest() -> None:
    places = [tuple(GRID.coordinates(rank).values()) for rank in range(GRID.world_size)]
    assert places == list(product(*map(range, (2, 3, 2, 2, 4))))
    assert list(GRID.coordinates(0)) == list(AXES)


def test_another_order_of_axes_is_detected() -> None:
    other = list(product(*map(range, (4, 2, 2, 3, 2))))
    assert [tuple(reversed(place)) for place in other] != [
        tuple(GRID.coordinates(rank).values()) for rank in range(GRID.world_size)
    ]


def test_data_ranks_and_fsdp_ranks_are_numbered_consecutively() -> None:
    assert (GRID.world_size, GRID.data, GRID.fsdp, GRID.n_stages) == (96, 6, 4, 2)
    for rank in range(GRID.world_size):
        at = GRID.coordinates(rank)
        assert GRID.data_rank(rank) == at["replicate"] * 2 + at["shard"]
        assert GRID.fsdp_rank(rank) == at["shard"] * 2 + at["context"]
    readers = [GRID.data_rank(rank) for rank in range(GRID.world_size)]
    assert [readers.count(part) for part in range(6)] == [16] * 6


@pytest.mark.parametrize("axis", AXES)
def test_peers_differ_on_one_axis_only(axis: str) -> None:
    for rank in (0, 37, 95):
        peers = GRID.peers(rank, axis)
        assert [GRID.coordinates(peer)[axis] for peer in peers] == list(range(getattr(GRID, axis)))
        assert {tuple(GRID.coordinates(peer) | {axis: 0}) for peer in peers} == {
            tuple(GRID.coordinates(rank) | {axis: 0})
        }
        assert rank in peers


@pytest.mark.parametrize(
    ("axis", "ranks_per_node", "inside"),
    [
        ("tensor", 8, True),
        ("tensor", 4, True),
        ("tensor", 6, False),
        ("context", 8, True),
        ("context", 4, False),
        ("shard", 8, False),
    ],
)
def test_an_axis_is_inside_a_node_if_all_its_groups_are(axis: str, ranks_per_node: int, inside: bool) -> None:
    assert GRID.is_inside_node(axis, ranks_per_node) is inside
    nodes = [{peer // ranks_per_node for peer in GRID.peers(rank, axis)} for rank in range(GRID.world_size)]
    assert all(len(node) == 1 for node in nodes) is inside


def test_expert_axes_fold_the_ranks_of_shard_context_and_tensor() -> None:
    folded = Layout(pipeline=2, shard=2, context=2, tensor=2, expert=2, expert_tensor=2)
    assert (folded.world_size, folded.expert_data) == (16, 2)
    places = [tuple(folded.expert_coordinates(rank).values()) for rank in range(16)]
    assert places == 2 * list(product(range(2), range(2), range(2)))
    assert list(folded.expert_coordinates(0)) == list(EXPERT_AXES)
    assert Layout(replicate=3, shard=4, context=2, expert=4).expert_data == 2


def test_str_names_the_axes() -> None:
    assert str(GRID) == "pipeline=2 replicate=3 shard=2 context=2 tensor=4"
    assert str(Layout(shard=4, expert=2, expert_tensor=2)) == "shard=4 expert=2 expert_tensor=2"
    assert str(Layout()) == "one process"


def test_docstring_examples_are_right() -> None:
    for module in (layout, schedule):
        result = doctest.testmod(module)
        assert result.failed == 0, module
        assert result.attempted >= 2, module
