"""Whether a prepared data set fits a model."""

from collections.abc import Sequence

from pipelines.cli.config import require
from pipelines.cli.errors import DataError
from pipelines.data.dataset import Int64s, PreparedDataset
from pipelines.models.classes import UNTOLD, check_label_names


def check_images(field: str, uri: str, data: PreparedDataset, expected: tuple[int, int, int]) -> None:
    """Refuse images of another shape than the model's, (H, W, C), or of another range; `data` is that of `field`.

    Raises:
        DataError: They are.
    """
    if data.image_shape != expected:
        raise DataError(
            f"{field} = {uri}: images are {'x'.join(map(str, data.image_shape))} (H x W x C), the model's are "
            f"{'x'.join(map(str, expected))}; ingest the source again in that size and mode"
        )
    _, images = data.read_groups([0])
    if images.max() == 1:
        raise DataError(
            f"{field} = {uri}: levels are 0..1, the model's are 0..255; were images in [0, 1] cast to integers? "
            "Multiply by 255 and ingest again"
        )


def fitting_labels(field: str, uri: str, data: PreparedDataset, names: Sequence[str]) -> Int64s | None:
    """The labels of `data` that are there, which are by number and by name those of a model whose classes are called
    `names`; None if it has none at all.

    Raises:
        DataError: They are others.
    """
    found = data.read_labels()
    found = found[found >= 0]
    if not len(found):
        return None
    try:
        check_label_names(field, uri, data.label_names, names)
    except DataError as error:
        raise DataError(f"{error}; --labels null does without them") from error
    if found.max() >= len(names):
        raise DataError(
            f"{field} = {uri}: has the label {found.max()}, the model's classes are 0..{len(names) - 1}; take data "
            "with the labels that the model was trained with; --labels null does without them"
        )
    return found


def are_labels_told(asked: str, uri: str, data: PreparedDataset, names: Sequence[str]) -> bool | None:
    """Whether a model whose classes are called `names` is told the labels of `data`, which lie at `uri`; None of one
    that was trained without labels. `asked` is the field `labels`: null, auto (where the data have labels), or what
    needs labels.

    Raises:
        ConfigError: Labels are needed, and the model was trained without.
        DataError: Labels are needed, and the data have none; or theirs are others than the model's.
    """
    if not names:
        require(asked in ("auto", "null"), "labels", asked, UNTOLD)
        return None
    if asked == "null":
        return False
    has_labels = fitting_labels("data", uri, data, names) is not None
    if asked != "auto" and not has_labels:
        raise DataError(f"data = {uri}: has no labels, which labels = {asked} needs; ingest with labels")
    return has_labels
