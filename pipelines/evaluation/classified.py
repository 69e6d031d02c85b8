"""How good a classification is: accuracy, confusion, calibration and effort, from the stored rows alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import binomtest

from pipelines.evaluation.request import ClassifierRequest

COLUMNS = ("label", "predicted", "margin", "margin_error", "class_evaluations")
# Of the calibration curve: equal parts of the range of confidence.
BINS = 10


def class_rows(table: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """What a shard's rows say of the classification, [n] each: `COLUMNS`, the label -1 where there is none, and
    `confidence`, the posterior of the class that is predicted."""
    columns = {name: table[name].fill_null(-1).to_numpy() for name in COLUMNS}
    posterior = table["posterior"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return {**columns, "confidence": posterior.max(1)}


def classification(shards: Sequence[dict[str, npt.NDArray[Any]]], asked: ClassifierRequest) -> dict[str, Any]:
    """JSON: what is reported of the classification of images whose rows are `shards`, as of `class_rows`.

    Images whose label is none of the classes are predicted too, and count for the effort alone.

    `accuracy`: share of right predictions, with Wilson's 95% interval. `confusion` [K][K]: images of each class (row)
    that were predicted as each class (column). `calibration`: of images by confidence (Guo 2017, eqs. 2 and 3), `ece`
    the mean distance of accuracy and confidence (eq. 5). `undecided`: images whose best two classes were not apart
    when the rounds were over; null where none is given up. `evaluations`: calls of the network, and those without
    giving up.
    """
    rows = {name: np.concatenate([shard[name] for shard in shards]) for name in (*COLUMNS, "confidence")}
    classes = np.array(asked.classes)
    known = np.isin(rows["label"], classes)
    label, predicted, confidence = (rows[name][known] for name in ("label", "predicted", "confidence"))
    right = label == predicted
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (np.searchsorted(classes, label), np.searchsorted(classes, predicted)), 1)
    calibration = _calibration(confidence, right)
    undecided = None
    if asked.separation is not None:
        undecided = int((rows["margin"] <= asked.separation * rows["margin_error"]).sum())
    num_images, evaluations = len(rows["label"]), int(rows["class_evaluations"].sum())
    return {
        "classes": list(asked.classes),
        "num_images": num_images,
        "accuracy": share(int(right.sum()), len(right)) if len(right) else None,
        "confusion": confusion.tolist(),
        "calibration": calibration,
        "ece": (
            sum(
                abs(each["accuracy"]["mean"] - each["confidence"]) * each["accuracy"]["num_images"]
                for each in calibration
            )
            / len(right)
            if len(right)
            else None
        ),
        "undecided": undecided,
        "evaluations": evaluations,
        "evaluations_without_giving_up": num_images * asked.evaluations_per_image,
    }


def share(count: int, num_images: int) -> dict[str, Any]:
    """A share of images with Wilson's 95% interval (Wilson 1927)."""
    found = binomtest(count, num_images).proportion_ci(0.95, method="wilson")
    return {"mean": count / num_images, "interval": [float(found.low), float(found.high)], "num_images": num_images}


def _calibration(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """The bins that hold images, by rising confidence: its mean, and the accuracy."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[place == each].mean()),
            "accuracy": share(int(right[place == each].sum()), int((place == each).sum())),
        }
        for each in np.unique(place)
    ]
