"""Which class each image of a sample set is of: what a user writes, and what follows from it for a model.

all, all:100        every class of the model, one after another
3,5 or 3:100,5:50   these, by name or index
balanced            every class in turn: 0, 1, ..., K-1, 0, ...
from:DATASET        image i is of the class of row i of a prepared data set
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.cli.config import require
from pipelines.cli.errors import DataError
from pipelines.data.dataset import Int64s, PreparedDataset
from pipelines.models.classes import check_label_names, class_index

_FORMS = "must be all, balanced, from:DATASET, or classes as 3,5 or 3:100,5:50"
_FROM = "from:"


@dataclass(frozen=True)
class AskedLabels:
    """What a user writes of labels, taken apart.

    Attributes:
        text: As it is written.
        classes: Names or indices; None for all of the model's.
        counts: Images of each of the classes, a single number for `all`; None where the number of images decides.
        in_turn: Whether the classes alternate, and do not follow one after another.
        dataset: Whose rows have the labels; None for classes.
    """

    text: str
    classes: tuple[str, ...] | None = None
    counts: tuple[int, ...] | None = None
    in_turn: bool = False
    dataset: str | None = None

    @classmethod
    def parse(cls, text: str) -> "AskedLabels":
        """Raises ConfigError for what is none of the forms, or has a count that is none."""
        if text == "balanced":
            return cls(text, in_turn=True)
        if text.startswith(_FROM):
            require(text != _FROM, "labels", text, "must name a prepared data set, as from:DATASET")
            return cls(text, dataset=text.removeprefix(_FROM))
        parts = [_with_count(text, part.strip()) for part in text.split(",")]
        names, counts = tuple(name for name, _ in parts), tuple(count for _, count in parts if count is not None)
        require(all(names), "labels", text, _FORMS)
        require(len(counts) in (0, len(names)), "labels", text, "must give each class a count, or none and num_images")
        return cls(text, None if names == ("all",) else names, counts or None)

    @property
    def tells_number(self) -> bool:
        """Whether num_images follows from it."""
        return self.counts is not None or self.dataset is not None


def _with_count(text: str, part: str) -> tuple[str, int | None]:
    """Name and count of `NAME:COUNT`; what follows the colon is part of the name where it is no number."""
    name, colon, count = part.rpartition(":")
    if not colon or not count.strip().lstrip("+-").replace(".", "", 1).isdigit():
        return part, None
    digits = count.strip()  # what isdigit() finds a digit, as ², and thousands of them, int() refuses
    holds = digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits) >= 1
    require(
        holds, "labels", text, f"the count of {name or 'a class':.200} must be a whole number >= 1, not {count:.40}"
    )
    return name.strip(), int(digits)


@dataclass(frozen=True)
class SampleLabels:
    """The label of every image of a sample set.

    Attributes:
        num_images: How many images.
        classes: Indices, 0..K-1; None where `of_rows` are the labels.
        counts: Images of each class, one class after another; None where they alternate, and of `of_rows`.
        dataset_id: Of the data set whose rows have the labels.
        of_rows: Those labels, int64 [num_images] (-1: none).
    """

    num_images: int
    classes: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    dataset_id: str | None = None
    of_rows: Int64s | None = None

    def of(self, ids: Int64s) -> Int64s:
        """The labels int64 [n] of `ids` int64 [n]; -1: none, as beyond the last image."""
        inside = ids < self.num_images
        places = np.where(inside, ids, 0)
        if self.classes is None:
            assert self.of_rows is not None
            found = self.of_rows[places]
        elif self.counts is None:
            found = np.array(self.classes, np.int64)[places % len(self.classes)]
        else:
            found = np.array(self.classes, np.int64)[np.searchsorted(np.cumsum(self.counts), places, side="right")]
        return np.where(inside, found, np.int64(-1))

    def first_ids(self, each: int) -> dict[int, Int64s]:
        """The ids of the first `each` images of every class that there is, by class; -1: those without a label."""
        if self.classes is None:
            assert self.of_rows is not None
            return {int(label): np.flatnonzero(self.of_rows == label)[:each] for label in np.unique(self.of_rows)}
        if self.counts is None:
            step, stop = len(self.classes), min(self.num_images, len(self.classes) * each)
            turns = {label: np.arange(first, stop, step) for first, label in enumerate(self.classes)}
            return {label: ids for label, ids in turns.items() if len(ids)}
        starts = np.cumsum([0, *self.counts])[:-1].tolist()
        blocks = zip(self.classes, starts, self.counts, strict=True)
        return {label: np.arange(start, start + min(each, count)) for label, start, count in blocks}


def settle(
    asked: AskedLabels, num_images: int | None, names: Sequence[str], data: PreparedDataset | None
) -> SampleLabels:
    """What is asked of a model whose classes are called `names`; `data` is the opened `asked.dataset`.

    Raises:
        ConfigError: The model has no such class, or none at all; counts and num_images do not agree.
        DataError: The data set has no labels, or other ones than the model.
    """
    if not names:
        class_index("labels", asked.text, names)
    if data is not None:
        return _settle_rows(asked, num_images, names, data)
    classes = tuple(range(len(names)))
    if asked.classes is not None:
        classes = tuple(class_index("labels", written, names) for written in asked.classes)
    if len(set(classes)) < len(classes):
        twice = next(index for place, index in enumerate(classes) if index in classes[:place])
        require(False, "labels", asked.text, f"names class {twice} twice; name each class once")
    counts = asked.counts
    if counts is not None:
        counts = counts * len(classes) if asked.classes is None else counts
        total, given = sum(counts), num_images
        require(given in (None, total), "num_images", given, f"labels = {asked.text} ask for {total:,}; leave it out")
        return SampleLabels(total, classes, counts)
    assert num_images is not None, "by what the config checks"
    if asked.in_turn:
        return SampleLabels(num_images, classes)
    share, rest = divmod(num_images, len(classes))
    require(share >= 1, "num_images", num_images, f"must be at least {len(classes)}, one for each class of labels")
    return SampleLabels(num_images, classes, tuple(share + (place < rest) for place in range(len(classes))))


def _settle_rows(
    asked: AskedLabels, num_images: int | None, names: Sequence[str], data: PreparedDataset
) -> SampleLabels:
    rows, given = data.num_rows, num_images or data.num_rows
    require(given <= rows, "num_images", given, f"labels = {asked.text}: holds {rows:,} rows; ask for at most as many")
    check_label_names("labels", asked.text, data.label_names, names)
    of_rows = data.read_labels()[:given]
    highest = int(of_rows.max())
    if highest < 0:
        raise DataError(f"labels = {asked.text}: none of the first {given:,} rows has a label; take data with labels")
    if highest >= len(names):
        raise DataError(
            f"labels = {asked.text}: has label {highest}, the model's classes are 0..{len(names) - 1}; take data with "
            "the labels that the model was trained with"
        )
    return SampleLabels(given, dataset_id=data.dataset_id, of_rows=of_rows)
