"""Bad labels of evaluations: where model or data have none or others, and classes and priors that are none."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from bad_inputs.datasets import as_column, data_set, with_shard
from bad_inputs.harness import Case
from bad_inputs.model_files import model_files
from support.image_files import write

_LABELLED = with_shard(as_column("label", pa.array([2] * 20, pa.int64())))


def _case(
    name: str,
    *options: str,
    says: str,
    kind: str = "eps, labels",
    make: Callable[[Path], None] = _LABELLED,
    code: int = 2,
) -> Case:
    """Asked of a model of a `kind`, whose three classes have no names."""

    def build(at: Path) -> list[str]:
        make(at / "data")
        write(at / "model", model_files(kind=kind))
        arguments = ["--model", "model", "--data", "data", "--output", "out", "--timesteps_per_image", "8"]
        return ["evaluate.py", *arguments, "--root", "root", *options]

    return Case("Labels of evaluations", name, build, (says,), code)


def _classifier(name: str, option: str, value: str, says: str) -> Case:
    return _case(name, "--classify", f"--classifier.{option}", value, says=f"classifier.{option} = {says}")


CASES = [
    _case(
        "the bound given labels that the model has not", "--labels", "given", kind="eps", says="labels = 'given': the"
    ),
    _case("classifying by a model without labels", "--classify", kind="eps", says="classify = True: the model was"),
    _case(
        "the bound given labels that the data have not",
        *("--labels", "both"),
        make=data_set,
        says="data = data: has no labels, which labels = both needs; ingest with labels",
        code=1,
    ),
    _case(
        "data with more classes than the model",
        make=with_shard(as_column("label", pa.array([7] * 20, pa.int64()))),
        says="data = data: has the label 7, the model's classes are 0..2",
        code=1,
    ),
    _classifier("an unknown class", "classes", "0,dog", "dog: is no class of the model, which has 0..2"),
    _classifier("one class alone", "classes", "1", "'1': must be two classes or more, which can be told apart"),
    _classifier("a class twice", "classes", "1,2,1", "'1,2,1': must not name a class twice"),
    _classifier("a prior of other length", "prior", "0.5,0.5", "'0.5,0.5': must have one number for each of 3 classes"),
    _classifier("a prior that sums to 1.5", "prior", "0.5,0.5,0.5", "'0.5,0.5,0.5': must sum to 1, not 1.5"),
    _classifier("a negative prior", "prior", "0.9,-0.1,0.2", "'0.9,-0.1,0.2': must be above 0; leave a class out by"),
    _classifier("a prior that is no number", "prior", "even", "'even': must be uniform, train_data, or numbers"),
    _classifier("the prior of unknown training data", "prior", "train_data", "'train_data': the training data are not"),
    _classifier("one time step in a round", "timesteps_per_round", "1", "1: must be at least 2"),
    _classifier("no separation", "separation", "0", "0.0: must be above 0 and finite, or null"),
]
