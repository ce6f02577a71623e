"""Records of steps for tests of those who receive them."""

from pretrain.runs.schema import RoutingStatistics, StepRecord


def step_record(
    step: int, loss: float = 3.25, mfu: float | None = None, routing: RoutingStatistics | None = None
) -> StepRecord:
    """The record of a step of one token."""
    return StepRecord(
        step=step,
        samples=step,
        tokens=step,
        loss=loss,
        lr=3e-4,
        grad_norm=0.8,
        tokens_per_s=1234.5,
        step_s=1.0,
        mfu=mfu,
        time=step,
        attempt=1,
        routing=routing,
    )
