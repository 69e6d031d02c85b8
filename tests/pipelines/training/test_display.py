"""What a training shows: a rate that is true of the whole attempt."""

import time

import pytest

from pipelines.tracking.spool import Record
from pipelines.training.config import OptimizationConfig, TrainConfig
from pipelines.training.display import Display


def metrics(step: int, timestamp_ms: int, **values: float) -> Record:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return Record("metrics", timestamp_ms, {"step": step, "values": named}, 0, 0)


def test_the_closing_rate_is_that_of_all_steps_of_the_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(TrainConfig(batch_size=10, train=OptimizationConfig(steps=100)), "starting 1 worker(s)")
    began = time.time_ns() // 1_000_000
    display.hear(metrics(40, began - 60_000, train__loss=9.0))  # of the attempt before, told again
    display.hear(metrics(40, began - 60_000, images_per_second=5.0))
    display.close()
    assert "nan" not in capsys.readouterr().err
    assert display.overall_rate is None
    display.hear(metrics(41, began + 1000, train__loss=1.0))
    assert display.overall_rate is None
    display.hear(metrics(61, began + 11_000, train__loss=0.5))  # 20 steps of 10 images in 10 s
    display.hear(metrics(61, began + 11_000, images_per_second=900.0))  # the last interval alone
    assert display.overall_rate == 20
    display.close()
    assert capsys.readouterr().err == "digits 61/100 (61%)  ETA 0:00  90.0 steps/s (900 images/s)  loss 0.5000\n"
