"""Metrics of the steps: each step once, with what all ranks have given; rates over the steps' own time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.cli.errors import NonFiniteLossError
from pipelines.training.config import OptimizationConfig, TrainConfig, TrainTrackingConfig
from pipelines.training.learner import StepResult
from pipelines.training.ranks import Ranks
from pipelines.training.reports import Reports
from pipelines.training.step_metrics import StepMetrics

CONFIG = TrainConfig(batch_size=10, train=OptimizationConfig(steps=25), tracking=TrainTrackingConfig(every_steps=10))
ALONE = Ranks(0, 1)


class TwoAlike(Ranks):
    """Rank 0 of two that give the same."""

    def add_up(self, values: Tensor) -> None:
        values *= 2


def metrics(ranks: Ranks = ALONE) -> tuple[StepMetrics, Reports]:
    reports = Reports(0, lambda report: None)
    return StepMetrics(CONFIG, 40, lambda step: step / 100, torch.device("cpu"), ranks, reports), reports


def result(loss: float, norm: float = 1.0, variance: float = 0.0) -> StepResult:
    """Of one rank alone."""
    moments = torch.tensor([loss, loss**2 + variance], dtype=torch.float64)
    return StepResult(torch.tensor(loss), torch.tensor(norm), moments)


def share(losses: list[float], batch_size: int) -> StepResult:
    """Of a rank whose rows have these losses."""
    rows = torch.tensor(losses, dtype=torch.float64)
    moments = torch.stack([rows.sum(), rows.square().sum()]) / batch_size
    return StepResult(moments[0].float(), torch.tensor(1.0), moments)


def test_every_step_is_reported_once_with_the_loss_of_all_ranks() -> None:
    found, reports = metrics(TwoAlike(0, 2))
    found.start_clock(3)
    for losses in ([0.5, 1.5, 1.0, 1.0, 1.0], [0.5] * 5):  # of 5 of 10 rows; the other rank's are the same
        found.add(replace(share(losses, 10), grad_norm=torch.tensor(4.0)))
    found.add_wait(0.0)
    found.collect(5)
    found.collect(5)  # nothing since
    records = reports.unsure()
    steps: list[dict[str, Any]] = [r for r in records if "train/loss" in r["values"]]
    assert [(r["step"], r["values"]) for r in steps] == [
        (4, {"train/loss": 1.0, "train/loss_variance": pytest.approx(0.1), "grad_norm": 4.0, "learning_rate": 0.03}),
        (5, {"train/loss": 0.5, "train/loss_variance": 0.0, "grad_norm": 4.0, "learning_rate": 0.04}),
    ]
    (rates,) = [r for r in records if "epoch" in r["values"]]
    assert rates["step"] == 5
    assert rates["values"]["epoch"] == 5 * 10 / 40
    assert rates["values"]["workers"] == 2
    assert rates["values"]["data_wait_fraction"] == 0.0


def test_the_rate_is_that_of_the_time_that_is_not_left_out() -> None:
    found, reports = metrics()
    found.start_clock(0)
    found.leave_out(-1000.0)  # as if the steps had taken so many seconds more
    found.add(result(0.5))
    found.add_wait(250.0)
    found.collect(1)
    values = reports.unsure()[-1]["values"]
    assert values["images_per_second"] == pytest.approx(10 / 1000, rel=0.1)
    assert values["data_wait_seconds"] == 250.0
    assert values["data_wait_fraction"] == pytest.approx(0.25, rel=0.1)


def test_the_variance_is_that_of_the_batch_however_it_is_divided() -> None:
    """Losses that differ in their eighth digit only, in uneven shares: nothing cancels, and nothing is negative."""
    losses = [1000.0 + 1e-5 * row for row in range(10)]

    class Other(Ranks):
        """Rank 0 of two; the other has the rest of the rows."""

        def add_up(self, values: Tensor) -> None:
            other = share(losses[3:], 10)
            values += torch.cat([other.loss[None].double(), other.moments])

    found, reports = metrics(Other(0, 2))
    found.start_clock(0)
    found.add(share(losses[:3], 10))
    found.collect(1)
    (variance,) = [r["values"]["train/loss_variance"] for r in reports.unsure() if "train/loss" in r["values"]]
    assert variance == pytest.approx(np.var(losses), rel=0.2)
    found, reports = metrics()
    found.start_clock(0)
    found.add(share([0.1] * 10, 10))
    found.collect(1)
    assert 0.0 <= reports.unsure()[0]["values"]["train/loss_variance"] < 1e-16


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (0.5, float("inf"))])
def test_the_first_step_that_is_not_finite_is_named(loss: float, norm: float) -> None:
    found, _ = metrics()
    found.start_clock(7)
    for each in (result(0.5), result(loss, norm), result(float("nan"))):
        found.add(each)
    told = f"step 9: loss = {loss}, gradient norm = {norm}; nothing after the last checkpoint is kept. Lower train."
    with pytest.raises(NonFiniteLossError) as raised:
        found.collect(10)
    assert str(raised.value).startswith(told)


def test_steps_are_collected_regularly_and_after_the_last() -> None:
    found, _ = metrics()
    assert [done for done in range(1, 26) if found.is_due(done)] == [10, 20, 25]
