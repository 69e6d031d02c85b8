"""A run directory as a whole: what tells that a directory is one, and what a finished training leaves in it.

RUN/config.json       what was asked for
RUN/owner.json        who began it
RUN/checkpoints/      see pipelines.models.checkpoints
RUN/result.json       what the last training to the end has left
RUN/tracking/         the spool
RUN/grids/, RUN/noise_schedules/, RUN/quality/, RUN/ray/
"""

from typing import Any

from pipelines.cli.errors import CheckpointError, ConfigError, StorageError
from pipelines.models.checkpoints import CheckpointStore
from pipelines.storage.location import Location
from pipelines.storage.ownership import first_file

CONFIG, RESULT, SPOOL = "config.json", "result.json", "tracking/spool.jsonl"
_RESULT_FIELDS = {
    "step": int,
    "model": str,
    "model_id": str,
    "dataset_id": str,
    "grid": str,
    "validation": dict | None,
    "parameters": int,
}


def is_run(directory: Location) -> bool:
    """Whether a training has begun in this directory."""
    own = (RESULT, SPOOL, f"{SPOOL}.lock")  # the lock is made before the spool
    if any((directory / name).exists() for name in own) or CheckpointStore.open(directory.uri).steps():
        return True
    try:
        config = (directory / CONFIG).read_json()
    except StorageError:
        return False
    # Other software calls its files that, too.
    return isinstance(config, dict) and {"data", "diffusion", "network", "train"} <= config.keys()


def require_own(directory: Location) -> None:
    """Refuse to train in a directory that holds files and no run.

    Raises:
        ConfigError: It does.
        StorageError: It cannot be listed.
    """
    name = first_file(directory, CONFIG)
    if name is not None and not is_run(directory):
        raise ConfigError(
            f"name = {directory.name!r}: {directory} must be empty, or hold a run of this name; it holds {name!r}, "
            "which is of none; choose another name or root"
        )


def read_result(run: Location) -> dict[str, Any] | None:
    """What the run's last training to the end has left; None before there was one.

    Raises:
        CheckpointError: The file is not that.
        StorageError: It cannot be read, or is not JSON.
    """
    path = run / RESULT
    if not path.exists():
        return None
    result = path.read_json()
    if not isinstance(result, dict) or not all(isinstance(result.get(n), kind) for n, kind in _RESULT_FIELDS.items()):
        raise CheckpointError(
            f"{path.uri}: is not the result of a training; delete it and run again: it is made anew from the checkpoint"
        )
    return result
