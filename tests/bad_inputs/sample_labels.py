"""Bad labels and guidance of samples: labels that are none, or not the model's, and weaker models that do not fit."""

import json
from pathlib import Path

from bad_inputs.files import prepared
from bad_inputs.harness import Case
from bad_inputs.model_files import model_files
from bad_inputs.models import sample
from support.image_files import write


def _field(name: str, *options: str, says: str) -> Case:
    """Seen without a model."""
    return Case("Labels of samples", name, lambda at: sample("model", *options), (says,), code=2)


def _asked(name: str, *options: str, says: str, kind: str = "eps, labels", weaker: str = "", code: int = 2) -> Case:
    """Asked of a model of a `kind`, beside which lies one of the kind `weaker`."""

    def build(at: Path) -> list[str]:
        write(at / "model", model_files(kind=kind))
        if weaker:
            write(at / "weaker", model_files(kind=weaker))
        return sample("model", *options)

    return Case("Labels of samples", name, build, (says,), code)


def _rows(name: str, names: list[str] | None, says: str) -> Case:
    """The labels of a data set whose labels are called `names`; none of its rows has one."""

    def build(at: Path) -> list[str]:
        files = prepared()
        manifest = {**json.loads(files["manifest.json"]), "label_names": names}
        write(at / "data", {**files, "manifest.json": json.dumps(manifest).encode()})
        write(at / "model", model_files(kind="eps, labels"))
        return sample("model", "--labels", "from:data")

    return Case("Labels of samples", name, build, (says,))


_WEAKER = ("--guidance.model", "weaker", "--guidance.scale", "2")

CASES = [
    _field("no label", "--labels", "", says="labels = '': must be all, balanced, from:DATASET, or classes as 3,5"),
    _field("a count of 0", "--labels", "2:0", says="labels = '2:0': the count of 2 must be a whole number >= 1, not 0"),
    _field(
        "a count in superscript", "--labels", "3:²", says="labels = '3:²': the count of 3 must be a whole number >= 1"
    ),
    _field("a count of 5,000 digits", "--labels", f"3:{'9' * 5000}", says="of 3 must be a whole number >= 1, not 999"),
    _field("a negative count", "--labels", "all:-5", says="labels = 'all:-5': the count of all must be a whole number"),
    _field("a count of one class only", "--labels", "0:4,1", says="labels = '0:4,1': must give each class a count, or"),
    _field("labels of no data set", "--labels", "from:", says="labels = 'from:': must name a prepared data set"),
    _field("guidance without labels", "--guidance.scale", "2", says="guidance.scale = 2.0: needs labels, or a weaker"),
    _field("guidance that is infinite", "--guidance.scale", ".inf", says="guidance.scale"),
    _field(
        "an interval from high to low",
        *("--labels", "all", "--guidance.interval", "[5, 0.3]"),
        says="guidance.interval = (5.0, 0.3): must be two noise levels",
    ),
    _field(
        "an interval without an end",
        *("--labels", "all", "--guidance.interval", "[0.3, .inf]"),
        says="guidance.interval = (0.3, inf): must be two noise levels",
    ),
    _asked("a label out of range", "--labels", "0,3", says="labels = 3: is no class of the model, which has 0..2"),
    _asked("a negative label", "--labels=-1", says="labels = -1: is no class of the model, which has 0..2"),
    _asked("a label of 5,000 digits", "--labels", f"0,{'9' * 5000}", says=": is no class of the model, which has 0..2"),
    _asked("a label in superscript", "--labels", "²", says="labels = ²: is no class of the model, which has 0..2"),
    _asked("an unknown class", "--labels", "dog", says="labels = dog: is no class of the model, which has 0..2"),
    _asked("a class twice", "--labels", "1,1", says="labels = '1,1': names class 1 twice; name each class once"),
    _asked(
        "counts that are not num_images", "--labels", "all:4", says="num_images = 4: labels = all:4 ask for 12; leave"
    ),
    _asked(
        "labels of a model without", "--labels", "all", kind="eps", says="labels = all: the model was trained without"
    ),
    _asked(
        "labels of a data set that is not there",
        *("--labels", "from:data"),
        says="data: not a prepared data set (no manifest.json)",
        code=1,
    ),
    _rows("labels of a data set without", None, "labels = from:data: none of the first 4 rows has a label"),
    _rows(
        "labels of a data set with other names", ["a", "b", "c"], "labels = from:data: calls class 0 'a', the model '0'"
    ),
    _asked("a weaker model that is not there", *_WEAKER, says="guidance.model = weaker: holds neither a model", code=1),
    _asked(
        "a weaker model of another schedule",
        *_WEAKER,
        kind="eps",
        weaker="x_0",
        says="guidance.model = weaker: the weaker model has another noise schedule; take one that was trained with",
    ),
    _asked(
        "a weaker model of other classes",
        *_WEAKER,
        weaker="eps",
        says="guidance.model = weaker: the weaker model's number of classes is None, not 3; take one of the same kind",
    ),
    _asked(
        "a weaker model alone, without the variances of the other",
        *("--guidance.model", "weaker", "--guidance.scale", "0"),
        kind="learned variances",
        weaker="x_0",
        says="guidance.model = weaker: with guidance.scale = 0 it samples alone, and it predicts no variances",
    ),
]
