"""What a training's configuration leaves open, settled once its images are known.

What is settled goes into the run's config.json, its MLflow parameters and its checkpoints. A run that is continued
keeps what it was begun with.
"""

from dataclasses import replace
from typing import Any

from ddpm_core.errors import CheckpointError
from pipelines.data.dataset import PreparedDataset
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.config import TrainConfig


def complete(config: TrainConfig, dataset: PreparedDataset, newest: Checkpoint | None) -> TrainConfig:
    """The same with every field given, for the images of `dataset`; `newest` is the checkpoint that it goes on from.

    Raises:
        CheckpointError: The checkpoint's config is damaged.
    """
    begun_with = newest.state["config"] if newest is not None else {}
    try:
        network = config.network.for_images(dataset.image_shape, begun_with.get("network"))
    except (TypeError, AttributeError) as error:
        raise _damaged(newest, "network", begun_with) from error
    return replace(config, network=network)


def _damaged(newest: Checkpoint | None, section: str, begun_with: dict[str, Any]) -> CheckpointError:
    where = newest.location.uri if newest is not None else "checkpoint"
    found = repr(begun_with.get(section))[:100]
    return CheckpointError(f"{where}/state.json: config.{section} = {found}: is damaged; restore the checkpoint")
