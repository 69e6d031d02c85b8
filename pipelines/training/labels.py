"""What a training makes of its data's labels: how many classes there are, their names, how often each is taken."""

from dataclasses import replace

import numpy as np

from pipelines.cli.config import require
from pipelines.cli.errors import DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.epochs import MAX_PASSES, epochs_of
from pipelines.models.classes import check_label_names
from pipelines.training.config import TrainConfig


def settle_labels(config: TrainConfig, dataset: PreparedDataset) -> tuple[TrainConfig, list[str]]:
    """The same with the number of classes given, for the labels of `dataset`, and what to say of it, in lines; the
    labels are read only where something is made of them.

    Raises:
        ConfigError: The data set has no labels or others than the fields say, or its classes cannot be balanced.
        DataError: Its labels and their names do not go together.
    """
    lines = []
    classes, balanced = config.network.num_classes, config.data.balance_classes
    if classes is not None or balanced:
        labels = dataset.read_labels()
        field = "network.num_classes" if classes is not None else "data.balance_classes"
        value = classes if classes is not None else balanced
        require(labels.max(initial=-1) >= 0, field, value, f"needs labels, which {config.data.train} has none of")
        unlabelled, largest = int((labels < 0).sum()), int(labels.max())
        check_range("data.train", config.data.train, largest, dataset.label_names)
        if classes is not None:
            config = _with_classes(config, dataset, largest)
            names = label_names(dataset, config.network.num_classes)
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            without = f"; {unlabelled:,} row(s) have no label and train the null class" if unlabelled else ""
            lines.append(f"classes: {len(names)} ({shown}){without}")
    if balanced:
        epochs = epochs_of(dataset, config.data.hold_out or 0, True)
        rule = (
            f"must be false: one class has so many more rows than another that each epoch would take some "
            f"{epochs.passes:,} times, more than {MAX_PASSES:,}"
        )
        require(epochs.passes <= MAX_PASSES, "data.balance_classes", True, rule)
        trained = epochs.hold_out.num_trained
        lines.append(
            f"balanced classes: an epoch takes {epochs.length:,} rows, each of the {trained:,} once to {epochs.passes} "
            f"times; {epochs.length - trained:,} are repeats"
        )
    return config, lines


def _with_classes(config: TrainConfig, dataset: PreparedDataset, largest: int) -> TrainConfig:
    network, named = config.network, dataset.label_names
    found = largest + 1 if named is None else len(named)
    classes = found if network.num_classes == "auto" else network.num_classes
    assert classes is not None
    if named is not None:
        rule = f"must be auto, or {found}: so many classes are named in {config.data.train}"
        require(classes == found, "network.num_classes", classes, rule)
    rule = f"must be auto, or at least {found}: {config.data.train} has the label {largest}"
    require(classes >= found, "network.num_classes", classes, rule)
    return replace(config, network=replace(network, num_classes=classes))


def label_names(dataset: PreparedDataset, num_classes: int | str | None) -> tuple[str, ...]:
    """What the classes 0..K-1 are called: as in the data set, or their numbers; () without classes."""
    if not isinstance(num_classes, int):
        return ()
    return dataset.label_names or tuple(map(str, range(num_classes)))


def check_range(field: str, uri: str, largest: int, names: tuple[str, ...] | None) -> None:
    """Raise DataError for a data set that has a label without a name."""
    if names is not None and largest >= len(names):
        raise DataError(
            f"{field} = {uri}: has the label {largest}, and names of {len(names)} classes only; ingest it again"
        )


def check_validation(config: TrainConfig, dataset: PreparedDataset, trained: PreparedDataset) -> None:
    """That the labels of a validation set are those of the data set that is trained on, where labels are learned.

    Raises:
        DataError: They are not.
    """
    classes, uri = config.network.num_classes, str(config.data.validation)
    if not isinstance(classes, int):
        return
    check_label_names("data.validation", uri, dataset.label_names, label_names(trained, classes))
    largest = int(np.max(dataset.read_labels(), initial=-1))
    if largest >= classes:
        raise DataError(
            f"data.validation = {uri}: has the label {largest}, the model classes 0..{classes - 1}; take data with the "
            "labels of data.train"
        )
