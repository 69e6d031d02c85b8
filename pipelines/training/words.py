"""What is trained and by which bound it is measured, in words for the terminal and MLflow; without torch."""

from collections.abc import Mapping
from typing import Any

from ddpm_core.kind import kind_of
from ddpm_core.likelihood import GIVEN_LABEL, untold_name
from pipelines.cli.console import with_interval
from pipelines.models.checkpoints import CheckpointStore
from pipelines.training.config import OptimizationConfig, TrainJob

_LOSSES = {"simple": "L_simple", "vlb": "L_vlb", "min_snr": "min-SNR", "hybrid": "L_hybrid"}
_TIMES = {"uniform": "uniform t", "even": "even t", "importance": "t by importance", "log_normal": "log-normal σ"}


def bound_in_words(bound: str, num_timesteps: int | None) -> str:
    """A bound by its variances, T and decoder, from its name (`ddpm_core.likelihood.bounds`); `num_timesteps` is the
    model's own T.

    >>> bound_in_words("beta_tilde", 1000), bound_in_words("steps_50.learned", 4000)
    ('σ² = beta_tilde, T = 1,000, discretised Gaussian', 'σ² = learned, T = 50, discretised Gaussian')
    >>> bound_in_words("continuous", None), bound_in_words("steps_50", None)
    ('continuous time, softmax decoder', 'T = 50, softmax decoder')
    >>> bound_in_words("given_label.beta", 1000)
    'given the label, σ² = beta, T = 1,000, discretised Gaussian'
    """
    if bound.startswith(GIVEN_LABEL):
        return f"given the label, {bound_in_words(untold_name(bound), num_timesteps)}"
    *steps, last = bound.split(".")
    if last == "continuous":
        return "continuous time, softmax decoder"
    if last.startswith("steps_"):
        return f"T = {int(last.removeprefix('steps_')):,}, softmax decoder"
    T = int(steps[0].removeprefix("steps_")) if steps else num_timesteps
    return f"σ² = {last}, " + (f"T = {T:,}, " if T else "") + "discretised Gaussian"


def objective_in_words(train: OptimizationConfig) -> str:
    """The loss, and the times where they are chosen.

    >>> objective_in_words(OptimizationConfig()), objective_in_words(OptimizationConfig(loss="vlb", times="importance"))
    ('L_simple', 'L_vlb, t by importance')
    """
    return _LOSSES[train.loss] + ("" if train.times == "auto" else f", {_TIMES[train.times]}")


def quality_in_words(found: Mapping[str, Any]) -> str:
    """How close samples are to validation images, from a `quality` of a result.

    >>> limit, kid = {"value": 1.5, "low": 1.0, "high": 2.0}, {"value": 0.01, "low": 0.005, "high": 0.015}
    >>> numbers = {"fd": {"value": 1.75}, "fd_limit": limit, "kid": kid}
    >>> sides = {"num_samples": 300, "num_reference": 10000}
    >>> quality_in_words({"extractor": {"name": "random_conv_64"}, "numbers": numbers, **sides})
    'FD 1.750, n → ∞ 1.500 (1.000 to 2.000), KID 0.01000 (0.00500 to 0.01500); random_conv_64, 300 samples, 10,000 \
validation images'
    """
    numbers = found["numbers"]
    return (
        f"FD {numbers['fd']['value']:.3f}, n → ∞ {with_interval(numbers['fd_limit'])}, "
        f"KID {with_interval(numbers['kid'])}; {found['extractor']['name']}, {found['num_samples']:,} samples, "
        f"{found['num_reference']:,} validation images"
    )


def trained_as(job: TrainJob, step: int) -> str:
    """What kind of model the training has made after `step` steps, of which there is a checkpoint, and by what.

    Raises:
        StorageError: The checkpoint's model cannot be read.
    """
    model = (CheckpointStore.open(job.run).directory(step) / "model" / "config.json").read_json()
    return f"{kind_of(model)}, trained by {objective_in_words(job.config.train)}"
