"""The classes of a model, as users name them."""

from collections.abc import Sequence

from pipelines.cli.errors import ConfigError, DataError

UNTOLD = "the model was trained without labels; leave it out, or take another model"
"""Why labels are refused of a model without classes, and what helps."""


def class_index(field: str, text: str, names: Sequence[str]) -> int:
    """The class that `text` names or, where no class is called so, the one with that index.

    Raises:
        ConfigError: The model, whose classes are called `names`, has no such class, or none at all.
    """
    if not names:
        raise ConfigError(f"{field} = {text:.300}: {UNTOLD}")
    if text in names:
        return names.index(text)
    # int() refuses thousands of digits.
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(names):
        return int(text)
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    numbers = "" if all(name.isdigit() for name in names) else f"; by name {known}"
    raise ConfigError(f"{field} = {text:.300}: is no class of the model, which has 0..{len(names) - 1}{numbers}")


def check_label_names(field: str, uri: str, of_data: Sequence[str] | None, of_model: Sequence[str]) -> None:
    """That labels of a data set mean to the model what they mean in the data; `of_data` is None where they are numbers.

    Raises:
        DataError: They do not.
    """
    if of_data is None or tuple(of_data) == tuple(of_model):
        return
    different = next((i for i, pair in enumerate(zip(of_data, of_model, strict=False)) if pair[0] != pair[1]), None)
    if different is None:
        what = f"has {len(of_data)} classes, the model {len(of_model)}"
    else:
        what = f"calls class {different} {of_data[different]!r}, the model {of_model[different]!r}"
    raise DataError(f"{field} = {uri}: {what}; take data with the labels that the model was trained with")
