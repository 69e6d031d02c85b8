"""The section `tracking` of every job that MLflow hears of."""

from dataclasses import dataclass

from pipelines.cli.config import require


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = None
    """Tracking server; null takes MLFLOW_TRACKING_URI, else a SQLite database under `root`."""
    experiment: str | None = None
    """MLflow experiment, so that trainings of many names, or comparisons of many models, are rows of one table; null
    takes the name of the training, or for other jobs that of the model with /samples, /eval, /quality or /encodings."""

    def __post_init__(self) -> None:
        require(self.experiment != "", "tracking.experiment", "", "must be a name, or null")
