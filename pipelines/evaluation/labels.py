"""What an evaluation does with labels: which bound is asked for, and how images are classified."""

import math
from collections.abc import Sequence

import numpy as np

from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cli.config import require
from pipelines.data.dataset import PreparedDataset
from pipelines.data.fit import are_labels_told, fitting_labels
from pipelines.evaluation.config import ClassifierConfig, EvaluateConfig
from pipelines.evaluation.request import ClassifierRequest, LabelsTold
from pipelines.models.classes import UNTOLD, class_index
from pipelines.models.used import UsedModel

# How far a prior may be from a sum of 1, as thirds that are written with three digits are.
_ROUNDING = 0.005


def asked_of_labels(
    config: EvaluateConfig, model: UsedModel, data: PreparedDataset, train: PreparedDataset | None
) -> tuple[LabelsTold | None, ClassifierRequest | None]:
    """What `labels` stands for, None of a model that was trained without them; and how the images are classified, None
    where `classify` does not ask for it. `train`: what a prior may be taken from.

    Raises:
        ConfigError: The model takes no labels; a field of `classifier` does not fit it.
        DataError: The data have no labels, or others than the model.
    """
    told = are_labels_told(config.labels, config.data, data, model.label_names)
    if told is None:
        require(not config.classify, "classify", True, UNTOLD)
        return None, None
    asked: LabelsTold = "null" if not told else "both" if config.labels == "both" else "given"
    if not config.classify:
        return asked, None
    if config.labels == "null":  # the labels are not told, and yet are what the classes are compared with
        fitting_labels("data", config.data, data, model.label_names)
    return asked, _classifier(config, model, train)


def _classifier(config: EvaluateConfig, model: UsedModel, train: PreparedDataset | None) -> ClassifierRequest:
    asked, process = config.classifier, model.model.denoiser.process
    if isinstance(process, DiscreteProcess):
        most = (config.num_timesteps or process.num_timesteps) - 1
        fits = asked.timesteps_per_round <= most
        require(fits, "classifier.timesteps_per_round", asked.timesteps_per_round, f"must be at most T - 1 = {most}")
    classes = _classes(asked, model.label_names)
    prior = _prior(config, classes, model, train)
    if prior is not None:
        prior = [prior[classes.index(label)] for label in sorted(classes)]
    return ClassifierRequest(
        tuple(sorted(classes)),
        asked.timesteps_per_round,
        asked.rounds,
        asked.separation,
        None if prior is None else tuple(prior),
    )


def _classes(asked: ClassifierConfig, names: Sequence[str]) -> list[int]:
    """In the order in which they are given."""
    field, given = "classifier.classes", asked.classes
    if given is None:
        chosen = list(range(len(names)))
    else:
        chosen = [class_index(field, text.strip(), names) for text in given.split(",")]
    require(len(set(chosen)) == len(chosen), field, given, "must not name a class twice")
    require(len(chosen) >= 2, field, given, "must be two classes or more, which can be told apart")
    return chosen


def _prior(
    config: EvaluateConfig, classes: Sequence[int], model: UsedModel, train: PreparedDataset | None
) -> list[float] | None:
    """Of each of `classes`; None: equal ones."""
    field, given = "classifier.prior", config.classifier.prior
    if given == "uniform":
        return None
    if given == "train_data":
        require(train is not None, field, given, "the training data are not known; name them with --train_data")
        assert train is not None
        labels = fitting_labels("train_data", config.train_data or train.location.uri, train, model.label_names)
        counts = np.bincount([] if labels is None else labels, minlength=len(model.label_names))[list(classes)]
        rarest = model.label_names[classes[int(counts.argmin())]]
        rule = f"no training image has the label {rarest!r}; leave it out by classifier.classes, or give numbers"
        require(bool(counts.min() > 0), field, given, rule)
        numbers = counts.tolist()
    else:
        numbers = _numbers(field, given)
        require(len(numbers) == len(classes), field, given, f"must have one number for each of {len(classes)} classes")
        positive = all(0.0 < number < math.inf for number in numbers)
        require(positive, field, given, "must be above 0; leave a class out by classifier.classes")
        sums = abs(math.fsum(numbers) - 1.0) <= _ROUNDING
        require(sums, field, given, f"must sum to 1, not {math.fsum(numbers):g}")
    total = math.fsum(numbers)
    return [number / total for number in numbers]


def _numbers(field: str, given: str) -> list[float]:
    try:
        return [float(text) for text in given.split(",")]
    except ValueError:
        require(False, field, given, "must be uniform, train_data, or numbers separated by commas")
        raise
