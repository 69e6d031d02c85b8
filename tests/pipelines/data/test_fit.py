"""Whether a prepared data set fits a model: shape, range of levels, labels by number and by name."""

from collections.abc import Callable

import numpy as np
import pytest

from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.data.fit import are_labels_told, check_images, fitting_labels

NAMES = ("cat", "dog", "2")


def test_images_of_another_shape_are_refused(make_dataset: Callable[..., PreparedDataset]) -> None:
    data = make_dataset(3, shape=(4, 6, 3))
    check_images("data", "uri", data, (4, 6, 3))
    with pytest.raises(DataError, match=r"^data = uri: images are 4x6x3 \(H x W x C\), the model's are 6x4x3; ingest"):
        check_images("data", "uri", data, (6, 4, 3))


def test_levels_of_0_and_1_are_refused(
    make_dataset: Callable[..., PreparedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(3)
    binary = np.eye(8, dtype=np.uint8)[None, :, :, None]
    monkeypatch.setattr(PreparedDataset, "read_groups", lambda self, groups: (np.arange(1), binary))
    with pytest.raises(DataError, match=r"^data = uri: levels are 0\.\.1, the model's are 0\.\.255"):
        check_images("data", "uri", data, (8, 8, 1))


@pytest.mark.parametrize(
    ("labels", "names", "found"),
    [
        ([0, None, 2], None, [0, 2]),
        ([0, None, 2], NAMES, [0, 2]),
        ([None] * 3, NAMES, None),
        ([None] * 3, ("a", "b"), None),
        (
            [0, 3, 1],
            None,
            r"^data = uri: has the label 3, the model's classes are 0\.\.2; .*--labels null does without",
        ),
        ([0, 1, 2], ("cat", "cow", "2"), "^data = uri: calls class 1 'cow', the model 'dog'; .*--labels null does wit"),
    ],
)
def test_labels_are_those_of_the_model_by_number_and_by_name(
    make_dataset: Callable[..., PreparedDataset],
    labels: list[int | None],
    names: tuple[str, ...] | None,
    found: list[int] | str | None,
) -> None:
    data = make_dataset(3, labels=labels, label_names=names)
    if isinstance(found, str):
        with pytest.raises(DataError, match=found):
            fitting_labels("data", "uri", data, NAMES)
    else:
        fitting = fitting_labels("data", "uri", data, NAMES)
        assert (None if fitting is None else fitting.tolist()) == found


@pytest.mark.parametrize(
    ("asked", "labels", "names", "told"),
    [
        ("auto", [0, None, 2], NAMES, True),
        ("auto", [None] * 3, NAMES, False),
        ("given", [0, None, 2], NAMES, True),
        ("both", [0, None, 2], NAMES, True),
        ("null", [0, 3, 1], NAMES, False),
        ("auto", [0, 3, 1], (), None),
        ("null", [0, 3, 1], (), None),
        ("both", [None] * 3, NAMES, r"^data = uri: has no labels, which labels = both needs; ingest with labels$"),
        ("auto", [0, 3, 1], NAMES, r"^data = uri: has the label 3"),
        ("given", [0, 1, 2], (), r"^labels = 'given': the model was trained without labels; leave it out, or take"),
    ],
)
def test_labels_are_told_where_model_and_data_have_them_and_nobody_objects(
    make_dataset: Callable[..., PreparedDataset],
    asked: str,
    labels: list[int | None],
    names: tuple[str, ...],
    told: bool | str | None,
) -> None:
    data = make_dataset(3, labels=labels)
    if isinstance(told, str):
        with pytest.raises((ConfigError, DataError), match=told):
            are_labels_told(asked, "uri", data, names)
    else:
        assert are_labels_told(asked, "uri", data, names) is told
