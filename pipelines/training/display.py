"""A running training on the terminal: what is waited for, steps, rate, loss."""

import time

from pipelines.cli.console import ProgressLine
from pipelines.tracking.spool import Record
from pipelines.training.config import TrainConfig


class Display:
    """The progress line of one attempt.

    Args:
        config: The training's.
        first: What the first step waits for, such as "starting 2 workers".
    """

    def __init__(self, config: TrainConfig, first: str) -> None:
        self._batch_size = config.batch_size
        self._line = ProgressLine(config.name, config.train.steps, "steps", first)
        self._began_ms = time.time_ns() // 1_000_000
        self._loss = float("nan")
        self._steps: list[tuple[int, int]] = []  # the first and the latest, with their times

    def hear(self, record: Record) -> None:
        """Take a record of metrics."""
        step, values = record.payload["step"], record.payload["values"]
        if record.timestamp_ms < self._began_ms:
            return  # a resumed run also tells again of steps that an earlier attempt has made
        if "train/loss" in values:
            self._loss = values["train/loss"]
            self._steps[1:] = [(step, record.timestamp_ms)]
        if "first_batch_seconds" in values:
            self._line.wait_for("training, until the first report of a rate and a loss")
        if rate := values.get("images_per_second"):
            self._line.update(step, rate / self._batch_size, f"({rate:,.0f} images/s)  loss {self._loss:.4f}")

    @property
    def overall_rate(self) -> float | None:
        """Images per second from the end of this attempt's first step to that of its last, checkpoints, validation and
        restarts included; None before the second step."""
        if len(self._steps) < 2:
            return None
        (first, began), (last, ended) = self._steps
        return (last - first) * self._batch_size * 1000 / max(ended - began, 1)

    def close(self) -> None:
        """Take the line off the terminal."""
        self._line.close()
