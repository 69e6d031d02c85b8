"""What a training makes of its data's labels: the number of classes, their names, the balance of its epochs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pipelines.cli.config import differences, parse
from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.models.checkpoints import Checkpoint
from pipelines.storage.location import Location
from pipelines.training import labels as module
from pipelines.training.complete import complete
from pipelines.training.config import TrainConfig
from pipelines.training.labels import check_validation, label_names, settle_labels

CLASSES = ("--network.num_classes", "auto")
BALANCED = ("--data.balance_classes", "true")


def config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, ("--data.train", "/photos", *argv), "Train.")


@pytest.mark.parametrize(
    ("labels", "names", "argv", "classes", "called", "said"),
    [
        ([0, 2, 1, 2], None, CLASSES, 3, ("0", "1", "2"), "classes: 3 (0, 1, 2)"),
        ([0, 0, 1, 0], ("cat", "dog", "cow"), CLASSES, 3, ("cat", "dog", "cow"), "classes: 3 (cat, dog, cow)"),
        ([0, 2, 1, 2], None, ("--network.num_classes", "5"), 5, tuple("01234"), "classes: 5 (0, 1, 2, 3, 4)"),
        (
            [0, None, 1, -7],
            None,
            CLASSES,
            2,
            ("0", "1"),
            "classes: 2 (0, 1); 2 row(s) have no label and train the null class",
        ),
    ],
)
def test_the_number_of_classes_follows_the_labels_and_their_names(
    make_dataset, labels: Sequence[int | None], names, argv, classes: int, called, said: str
) -> None:
    dataset = make_dataset(4, labels=labels, label_names=names)
    settled, lines = settle_labels(config(*argv), dataset)
    assert (settled.network.num_classes, lines) == (classes, [said])
    assert label_names(dataset, classes) == called
    assert settle_labels(settled, dataset) == (settled, lines)


def test_labels_are_read_only_where_something_is_made_of_them(make_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PreparedDataset, "read_labels")
    dataset = make_dataset(4, labels=[0, 1, 2, 3], label_names=tuple("abcd"))
    assert settle_labels(config(), dataset) == (config(), [])
    assert label_names(dataset, None) == ()


def test_a_balanced_epoch_is_told_of_and_one_of_very_unequal_classes_refused(
    make_dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(9, labels=[0, 0, 0, 0, 0, 1, 1, 2, None])
    _, (line,) = settle_labels(config(*BALANCED), dataset)
    assert line == "balanced classes: an epoch takes 16 rows, each of the 9 once to 5 times; 7 are repeats"
    monkeypatch.setattr(module, "MAX_PASSES", 4)
    with pytest.raises(ConfigError, match=r"balance_classes = True: must be false: .* some 5 times, more than 4"):
        settle_labels(config(*BALANCED), dataset)


def test_a_run_without_labels_goes_on_without_and_is_refused_with_them(make_dataset) -> None:
    """Its checkpoint was written before there were any: none of the fields is in its config."""
    dataset = make_dataset(40, labels=np.arange(40) % 3)
    begun, _ = complete(config(), dataset, None)
    stored = begun.semantic()
    assert "num_classes" not in stored["network"]
    assert "label_dropout" not in stored["train"]
    assert "balance_classes" not in stored["data"]
    newest = Checkpoint(Location.parse("/run/checkpoints/step-00000100"), {"step": 100, "config": stored})
    again, _ = complete(config(), dataset, newest)
    assert differences(stored, again.semantic()) == []
    for argv, changed in [
        (CLASSES, "network.num_classes: None -> 3"),
        (BALANCED, "data.balance_classes: None -> True"),
    ]:
        other, _ = complete(config(*argv), dataset, newest)
        assert differences(stored, other.semantic()) == [changed]


def test_a_run_with_classes_goes_on_with_auto_and_is_refused_without(make_dataset) -> None:
    dataset = make_dataset(40, labels=np.arange(40) % 3)
    begun, _ = complete(config(*CLASSES, "--train.label_dropout", "0.2"), dataset, None)
    stored = begun.semantic()
    assert (stored["network"]["num_classes"], stored["train"]["label_dropout"]) == (3, 0.2)
    newest = Checkpoint(Location.parse("/run/checkpoints/step-00000100"), {"step": 100, "config": stored})
    again, _ = complete(config(*CLASSES, "--train.label_dropout", "0.2"), dataset, newest)
    assert differences(stored, again.semantic()) == []
    without, _ = complete(config(), dataset, newest)
    assert differences(stored, without.semantic()) == [
        "network.num_classes: 3 -> None",
        "train.label_dropout: 0.2 -> None",
    ]


def test_a_validation_set_must_have_the_labels_that_are_learned(make_dataset) -> None:
    trained = make_dataset(4, labels=[0, 1, 2, 0], label_names=tuple("abc"))
    learned, _ = settle_labels(config(*CLASSES, "--data.validation", "/test"), trained)
    check_validation(learned, make_dataset(3, name="same", labels=[2, None, 0], label_names=tuple("abc")), trained)
    check_validation(learned, make_dataset(3, name="no names", labels=[2, None, 0]), trained)
    other = make_dataset(3, name="other", labels=[0, 1, 0], label_names=tuple("abd"))
    with pytest.raises(DataError, match=r"data.validation = /test: calls class 2 'd', the model 'c'"):
        check_validation(learned, other, trained)
    with pytest.raises(DataError, match=r"data.validation = /test: has the label 3, the model classes 0..2"):
        check_validation(learned, make_dataset(3, name="more", labels=[0, 3, 0]), trained)
    unconditional = replace(learned, network=replace(learned.network, num_classes=None))
    check_validation(unconditional, other, trained)
