"""What is checked, and settled, before a training starts anything."""

from dataclasses import dataclass, replace
from typing import Any

from ddpm_core.config import RANDOM_CONV_MIN_SIDE
from pipelines.cli.config import differences, require
from pipelines.cli.console import waiting
from pipelines.cli.errors import CheckpointError, ConfigError
from pipelines.cluster import demand, gpus
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.data.opening import open_dataset
from pipelines.models.checkpoints import Checkpoint, CheckpointStore
from pipelines.outputs.version import code_version
from pipelines.storage.location import Location
from pipelines.storage.ownership import begun_by, owner_of
from pipelines.training.complete import complete, made_from
from pipelines.training.config import FEWEST_QUALITY_IMAGES, HELD_OUT, TrainConfig, TrainJob
from pipelines.training.labels import check_validation
from pipelines.training.run_directory import CONFIG, read_result, require_own

_RESTORE = "give the run another `name`, or restore what it was started with"


@dataclass(frozen=True)
class Checked:
    """A training that can start.

    Attributes:
        job: What its workers are given; its config has every field settled.
        train_set: Trained on.
        validation_set: Validated on, `train_set` itself where its held-out rows are; None: nothing is.
        made_from: What the MLflow run is made from, as tags.
        told: What was settled, in lines for the user.
        result: What a run of the job that has done all its steps has left; None: there are steps to do.
    """

    job: TrainJob
    train_set: PreparedDataset
    validation_set: PreparedDataset | None
    made_from: dict[str, str]
    told: list[str]
    result: dict[str, Any] | None


def check(config: TrainConfig) -> Checked:
    """Everything that can be checked before workers start: the run directory, the data, its checkpoints, the GPUs.

    Raises:
        ConfigError: The network cannot take the images, the run is longer than `train.steps`, its directory holds files
            of something else, or this machine is too small.
        DataError: A data set is missing or damaged, or its labels are not those of the other.
        CheckpointError: The run's checkpoints are corrupt, or made from another data set or under another config.
        StorageError: `root` cannot be read.
    """
    root = Location.parse(config.root)
    run = root / "runs" / config.name
    require_own(run)
    with waiting("reading data set and checkpoints"):
        train_set = open_dataset(root, "data.train", config.data.train)
        newest = CheckpointStore.open(run.uri).newest()
    if newest is not None:
        _check_same_data(newest, config, train_set)
    cluster, of_gpus = gpus.settle(config.cluster, _begun_with(run) if newest is not None else None)
    config, told = complete(replace(config, cluster=cluster), train_set, newest)
    told += [of_gpus] if of_gpus else []
    validation_set = _validation_set(config, root, train_set)
    if newest is not None:
        owner = owner_of(run)
        _check_resumable(newest, config, owner)
        if begun_by(owner):
            told.append(f"{config.name} was begun by {owner}: this continues it")
    _check_quality(config, validation_set)
    config.network.unet_config(train_set.image_shape)  # refuses images that the network cannot take
    result = read_result(run)
    if result is not None and result["step"] != config.train.steps:
        result = None
    if result is None:
        scaling = config.cluster
        fields = {"GPU": ("cluster.gpus_per_worker", scaling.gpus_per_worker)}
        demand.check(scaling.worker_range[0], scaling.needs, fields, scaling.address)
    validation = validation_set.location.uri if validation_set else None
    job = TrainJob(config, run.uri, train_set.location.uri, validation, code_version())
    return Checked(job, train_set, validation_set, made_from(config, train_set, newest), told, result)


def _begun_with(run: Location) -> object:
    """The `cluster.gpus_per_worker` that the run was begun with, or had when it was last continued."""
    stored = (run / CONFIG).read_json() if (run / CONFIG).exists() else None
    cluster = stored.get("cluster") if isinstance(stored, dict) else None
    return cluster.get("gpus_per_worker") if isinstance(cluster, dict) else None


def _validation_set(config: TrainConfig, root: Location, train_set: PreparedDataset) -> PreparedDataset | None:
    if config.data.validation == HELD_OUT:
        return train_set
    if not config.data.validation:
        return None
    dataset = open_dataset(root, "data.validation", config.data.validation)
    if dataset.image_shape != train_set.image_shape:
        raise ConfigError(
            f"data.validation = {config.data.validation}: its images are {dataset.image_shape}, "
            f"those of data.train are {train_set.image_shape}; ingest both with the same size and channels"
        )
    check_validation(config, dataset, train_set)
    return dataset


def _check_quality(config: TrainConfig, validation_set: PreparedDataset | None) -> None:
    """Refuse to compare samples with too few validation images, or images that are too small for the extractor."""
    if not config.quality.num_images:
        return
    num_images, shape = 0, None
    if validation_set is not None:
        shape, num_images = validation_set.image_shape, validation_set.num_rows
        if config.data.validation == HELD_OUT:
            num_images = len(HoldOut(num_images, config.data.hold_out or 0).ids)
    rule = f"needs {FEWEST_QUALITY_IMAGES} validation images, there are {num_images:,}; validate on more, or leave it 0"
    require(num_images >= FEWEST_QUALITY_IMAGES, "quality.num_images", config.quality.num_images, rule)
    assert shape is not None
    side, (height, width, _) = RANDOM_CONV_MIN_SIDE, shape
    rule = f"needs images of {side} x {side} pixels, these have {height} x {width}; leave it 0"
    require(min(height, width) >= side, "quality.num_images", config.quality.num_images, rule)


def _check_same_data(newest: Checkpoint, config: TrainConfig, dataset: PreparedDataset) -> None:
    """Refuse to continue a run with other data."""
    stored = newest.state["dataset"]["id"]
    if stored != dataset.dataset_id:
        raise CheckpointError(
            f"data.train = {config.data.train}: the data set has changed since the run's checkpoint of step "
            f"{newest.step} (id {stored[:12]} -> {dataset.dataset_id[:12]}); {_RESTORE}"
        )


def _check_resumable(newest: Checkpoint, config: TrainConfig, owner: str | None) -> None:
    """Refuse to continue a run under another config, or to fewer steps than it has."""
    changed = differences(newest.state["config"], config.semantic())
    if changed:
        raise CheckpointError(
            f"name = {config.name!r}: the run's checkpoint of step {newest.step} was made with another config "
            f"({'; '.join(changed)}){begun_by(owner)}; {_RESTORE}"
        )
    if newest.step > config.train.steps:
        raise ConfigError(f"train.steps = {config.train.steps}: the run has {newest.step} steps already; {_RESTORE}")
