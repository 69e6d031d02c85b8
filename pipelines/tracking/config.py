"""The section `tracking` of every job that MLflow hears of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str | None = None
    """Tracking server; null takes MLFLOW_TRACKING_URI, else a SQLite database under `root`."""
