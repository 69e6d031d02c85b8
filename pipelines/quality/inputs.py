"""What a comparison reads, whether it fits together, and the request that follows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpm_core.model import model_from_bytes
from pipelines.cli.config import require
from pipelines.cli.console import event
from pipelines.cli.errors import DataError, ModelError, StorageError
from pipelines.data.dataset import Int64s, PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.data.opening import open_dataset
from pipelines.models.kept import stored_model
from pipelines.models.used import UsedModel
from pipelines.quality.config import QualityConfig, check_size
from pipelines.quality.extractors.asked import extractor_asked
from pipelines.quality.extractors.asking import Asked
from pipelines.quality.image_set import open_image_set
from pipelines.quality.request import FEWEST, ClassRequest, QualityRequest, Role, SideRequest, Space
from pipelines.quality.resize import KERNEL
from pipelines.sampling.sample_set import SampleSet
from pipelines.storage.location import Location

ImageSets = dict[Role, PreparedDataset | SampleSet]
_FIELDS: dict[Role, str] = {
    "samples": "samples",
    "reference": "reference",
    "train": "memorisation.train_data",
    "unseen": "memorisation.unseen_data",
}


@dataclass(frozen=True)
class Inputs:
    """What is read.

    Attributes:
        sets: The images by role.
        rows: Which of them, by role.
        extractors: What makes their features in each space.
        model: That made the samples; None where they are no sample set.
        classes: Those that are compared by themselves.
        label_names: Of the labels.
    """

    sets: ImageSets
    rows: dict[Role, SideRequest]
    extractors: dict[Space, Asked]
    model: UsedModel | None
    classes: tuple[ClassRequest, ...]
    label_names: tuple[str, ...]

    @property
    def sampler(self) -> str | None:
        """How the samples were made, for a person; None where they are no sample set."""
        samples = self.sets["samples"]
        return samples.made_by if isinstance(samples, SampleSet) else None

    @property
    def evaluations(self) -> int | None:
        """Of networks, for each sample; None where that is not known."""
        samples = self.sets["samples"]
        return samples.evaluations if isinstance(samples, SampleSet) else None


def read_inputs(config: QualityConfig, store: Location | None) -> Inputs:
    """Open and compare all that is read; says what the user should know of it.

    Raises:
        ConfigError: A field does not fit the images.
        DataError: There are no such images, too few of them, or the sides do not fit each other.
        ModelError: The extractor, or the model that made the samples, cannot be used.
        StorageError: Something cannot be read.
    """
    root = Location.parse(config.root)
    sets: ImageSets = {
        "samples": open_image_set(root, store, "samples", config.samples),
        "reference": open_image_set(root, store, "reference", config.reference),
    }
    samples = sets["samples"]
    model = _model_of(samples) if isinstance(samples, SampleSet) else None
    whole = {role: SideRequest(images.dataset_id, images.num_rows) for role, images in sets.items()}
    rows: dict[Role, SideRequest] = {**whole, **_of_memory(config, sets, model, store)}
    shape, given = _shape(config, samples), config.memorisation
    try:
        for role, side in rows.items():
            uri = getattr(config, role, None) or f"{sets[role].location}"
            _check_side(config, _FIELDS[role], uri, side, sets[role].image_shape, shape)
    except DataError as error:
        if role in whole or (given.train_data, given.unseen_data) != (None, None):
            raise
        event(f"no check of memorisation: {error}")
        sets, rows = {role: sets[role] for role in whole}, dict(whole)
    asked: list[Space] = ["features"] if "train" not in rows or config.features == "pixels" else ["features", "pixels"]
    extractors = {space: _extractor(config, space, shape) for space in asked}
    if samples.dataset_id == sets["reference"].dataset_id:
        raise DataError(
            f"reference = {config.reference}: holds the very images of samples (id {samples.dataset_id[:12]}), which "
            "tells nothing; compare with others"
        )
    classes, names = _classes(config, sets, model)
    return Inputs(sets, rows, extractors, model, classes, names)


def _model_of(samples: SampleSet) -> UsedModel:
    """The model that made a sample set, from the copy that it keeps."""
    found = stored_model(samples.location / "model")
    if found is None:
        raise ModelError(f"{samples.location / 'model'}: holds no model; restore it")
    return UsedModel(found, model_from_bytes(found.files, where=found.uri))


def _extractor(config: QualityConfig, space: Space, shape: tuple[int, int, int]) -> Asked:
    asked = config.features if space == "features" else space
    root = Location.parse(config.root).local_path
    try:
        return extractor_asked(asked, config.onnx, shape, config.tracking.uri, root, config.any_weights)
    except (DataError, ModelError, StorageError) as error:
        raise type(error)(f"features = {asked}: {error}") from error


def _shape(config: QualityConfig, samples: PreparedDataset | SampleSet) -> tuple[int, int, int]:
    """(H, W, C) of the images when they have been resized."""
    height, width, channels = samples.image_shape
    return (height, width, channels) if config.resize is None else (config.resize, config.resize, channels)


def _check_side(
    config: QualityConfig, field: str, uri: str, side: SideRequest, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Refuse images that do not fit those of samples, or that are too few or too many."""
    check_size(field, uri, side.num_images, config.shard_size)
    if len(side.rows) < FEWEST:
        raise DataError(f"{field} = {uri}: holds {len(side.rows)} image(s); intervals need at least {FEWEST}")
    if shape != wanted and (config.resize is None or shape[2] != wanted[2]):
        told, other = ("x".join(map(str, each)) for each in (shape, wanted))
        fix = "prepare it with jobs/ingest.py --channels" if shape[2] != wanted[2] else "give --resize"
        raise DataError(f"{field} = {uri}: images are {told} (H x W x C), those of samples {other}; {fix}")


def _of_memory(
    config: QualityConfig, sets: ImageSets, model: UsedModel | None, store: Location | None
) -> dict[Role, SideRequest]:
    """Training images and unseen ones, which are added to `sets`; none, with a word, where they are not known."""
    asked = config.memorisation
    if not asked.enabled:
        return {}
    train, every = _training_images(config, model, store)
    if train is None:
        return {}
    whole = SideRequest(train.dataset_id, train.num_rows)
    if asked.unseen_data is not None:
        unseen = open_image_set(Location.parse(config.root), store, "memorisation.unseen_data", asked.unseen_data)
        same = unseen.dataset_id == train.dataset_id
        require(not same, "memorisation.unseen_data", asked.unseen_data, "are the training images; name others")
        sets |= {"train": train, "unseen": unseen}
        return {"train": whole, "unseen": SideRequest(unseen.dataset_id, unseen.num_rows)}
    if len(HoldOut(train.num_rows, every).ids) >= FEWEST:
        sets |= {"train": train, "unseen": train}
        parts = {"train": "trained", "unseen": "held_out"}
        return {role: SideRequest(train.dataset_id, train.num_rows, every, part) for role, part in parts.items()}  # type: ignore[misc, arg-type]
    reference = sets["reference"]
    if reference.dataset_id == train.dataset_id:
        why = "the reference is what the model was trained on; give --memorisation.unseen_data"
        require(asked.train_data is None, "memorisation.train_data", asked.train_data, f"cannot be compared: {why}")
        event(f"no check of memorisation: {why}")
        return {}
    sets |= {"train": train, "unseen": reference}
    return {"train": whole, "unseen": SideRequest(reference.dataset_id, reference.num_rows)}


def _training_images(
    config: QualityConfig, model: UsedModel | None, store: Location | None
) -> tuple[PreparedDataset | SampleSet | None, int]:
    """The images that the model was trained on, and of how many neighbours one was held out."""
    asked, root = config.memorisation.train_data, Location.parse(config.root)
    known = model.trained_on if model else {}
    every = model.held_out_every if model else 0
    if asked is not None:
        given = open_image_set(root, store, "memorisation.train_data", asked)
        return given, every if given.dataset_id == known.get("id") else 0
    missing = "name them with --memorisation.train_data"
    if model is None:
        event(f"no check of memorisation: the samples do not say what they were trained on; {missing}")
        return None, 0
    try:
        found = open_dataset(root, "memorisation.train_data", known["uri"]) if known.get("uri") else None
        if found is not None and found.dataset_id == known.get("id"):
            return found, every
    except DataError:
        pass  # it was trained elsewhere, or its data are gone
    event(f"no check of memorisation: the model's training images are not where it says; {missing}")
    return None, 0


def _classes(
    config: QualityConfig, sets: ImageSets, model: UsedModel | None
) -> tuple[tuple[ClassRequest, ...], tuple[str, ...]]:
    """The classes that both sides have enough images of, and the names of all labels."""
    samples, reference = sets["samples"], sets["reference"]
    if not config.by_label:
        return (), ()
    counts = [_counts(images.read_labels()) for images in (samples, reference)]
    if not all(counts):
        if any(counts):
            event(f"no comparison by class: the {'samples' if counts[1] else 'reference images'} have no labels")
        return (), ()
    names = [_label_names(samples, model), _label_names(reference, None)]
    if all(names) and names[0] != names[1]:
        event("no comparison by class: the sides call their labels otherwise")
        return (), ()
    found = tuple(
        ClassRequest(label, counts[0][label], counts[1][label])
        for label in sorted(counts[0].keys() & counts[1].keys())
        if min(counts[0][label], counts[1][label]) >= FEWEST
    )
    return found, tuple(names[0] or names[1])


def _counts(labels: Int64s) -> dict[int, int]:
    """How many images have each label."""
    found, counts = np.unique(labels[labels >= 0], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _label_names(images: PreparedDataset | SampleSet, model: UsedModel | None) -> Sequence[str]:
    if isinstance(images, PreparedDataset):
        return images.label_names or ()
    return (model or _model_of(images)).label_names


def request_of(config: QualityConfig, inputs: Inputs) -> QualityRequest:
    """The request that a job's fields make with what it reads."""
    rows, pixels = inputs.rows, inputs.extractors.get("pixels")
    return QualityRequest(
        samples=rows["samples"],
        reference=rows["reference"],
        extractor=inputs.extractors["features"].request,
        neighbours=config.neighbours,
        classes=inputs.classes,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        block_size=config.block_size,
        device=config.cluster.device,
        resize=KERNEL if config.resize else None,
        train=rows.get("train"),
        unseen=rows.get("unseen"),
        pixels=pixels.request if pixels else None,
    )
