"""What is trained and by which bound it is measured, in words for the terminal and MLflow; without torch."""

from ddpm_core.kind import kind_of
from pipelines.models.checkpoints import CheckpointStore
from pipelines.training.config import OptimizationConfig, TrainJob

_LOSSES = {"simple": "L_simple", "vlb": "L_vlb", "min_snr": "min-SNR"}


def bound_in_words(bound: str, num_timesteps: int | None) -> str:
    """A bound by its variances, T and decoder, from its name (`ddpm_core.likelihood.bounds`); `num_timesteps` is the
    model's own T.

    >>> bound_in_words("beta_tilde", 1000), bound_in_words("steps_50.learned", 4000)
    ('σ² = beta_tilde, T = 1,000, discretised Gaussian', 'σ² = learned, T = 50, discretised Gaussian')
    >>> bound_in_words("continuous", None), bound_in_words("steps_50.continuous", None)
    ('continuous time, softmax decoder', 'T = 50, softmax decoder')
    """
    steps, _, variance = bound.rpartition(".")
    T = int(steps.removeprefix("steps_")) if steps else num_timesteps
    time = f"T = {T:,}" if T else "continuous time"
    return f"{time}, softmax decoder" if variance == "continuous" else f"σ² = {variance}, {time}, discretised Gaussian"


def objective_in_words(train: OptimizationConfig) -> str:
    """The loss.

    >>> objective_in_words(OptimizationConfig()), objective_in_words(OptimizationConfig(loss="min_snr"))
    ('L_simple', 'min-SNR')
    """
    return _LOSSES[train.loss]


def trained_as(job: TrainJob, step: int) -> str:
    """What kind of model the training has made after `step` steps, of which there is a checkpoint, and by what.

    Raises:
        StorageError: The checkpoint's model cannot be read.
    """
    model = (CheckpointStore.open(job.run).directory(step) / "model" / "config.json").read_json()
    return f"{kind_of(model)}, trained by {objective_in_words(job.config.train)}"
