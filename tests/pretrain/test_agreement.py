"""Before a step is taken, all processes must have decided alike and read the same data."""

from dataclasses import dataclass

import pytest
import torch.distributed as dist
from workers import WorkerPool

from parallel.layout import Layout
from parallel.world import World
from pretrain.config.loading import load
from pretrain.errors import UserError
from pretrain.train.inputs import check_ranks_agree
from pretrain.train.rank_info import RankInfo


@dataclass
class Data:
    fingerprint: str


def refusal(args: tuple[str, ...], data: str) -> str:
    """What a rank says when rank 1 has these settings and that data."""
    odd = dist.get_rank() == 1
    config = load(None, ["model.preset=tiny", *(args if odd else ())]).config
    try:
        check_ranks_agree(
            config, Data(data if odd else "a"), None, RankInfo(World(dist.get_rank(), 3), Layout(shard=3))
        )
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_agree_continue(workers: WorkerPool) -> None:
    assert workers.run(refusal, 3, (), "a") == ["", "", ""]


@pytest.mark.parametrize(
    ("args", "data", "message"),
    [
        (("train.precision=fp32",), "a", "train.precision=auto, and rank 1 has fp32"),
        ((), "b", "the data in data.path=a, and rank 1 has b"),
    ],
)
def test_a_rank_that_differs_is_named(args: tuple[str, ...], data: str, message: str, workers: WorkerPool) -> None:
    answers = workers.run(refusal, 3, args, data)
    assert message in answers[0]
    assert all(answers)
