"""What a training's configuration leaves open, settled once its images are known.

What is settled goes into the run's config.json, its MLflow parameters and its checkpoints. A run that is continued
keeps what it was begun with.
"""

from dataclasses import replace
from typing import Any

from pipelines.cli.config import digest, require
from pipelines.cli.errors import CheckpointError
from pipelines.cluster.precision import settle
from pipelines.data.dataset import PreparedDataset
from pipelines.data.hold_out import HoldOut
from pipelines.models.checkpoints import Checkpoint
from pipelines.training.config import DIGITS, DIGITS_TEST, HELD_OUT, DataConfig, TrainConfig
from pipelines.training.labels import settle_labels


def complete(config: TrainConfig, dataset: PreparedDataset, newest: Checkpoint | None) -> tuple[TrainConfig, list[str]]:
    """The same with every field given, for the images of `dataset`, and what to say of it, in lines.

    `newest` is the checkpoint that the training goes on from.

    Raises:
        ConfigError: Rows are to be held out, and there are too few; or the labels are not as the config says.
        DataError: The data set's labels and their names do not go together.
        CheckpointError: The checkpoint's config is damaged.
    """
    begun_with = newest.state["config"] if newest is not None else {}
    try:
        network = config.network.for_images(dataset.image_shape, begun_with.get("network"))
    except (TypeError, AttributeError) as error:
        raise _damaged(newest, "network", begun_with) from error
    every = None
    if newest is not None:
        data = begun_with.get("data", {})
        every = data.get("hold_out", 0) if isinstance(data, dict) else None
        if type(every) is not int or every < 0 or every == 1:
            raise _damaged(newest, "data", begun_with)
    data, line = _data(config.data, dataset.num_rows, every)
    section = begun_with.get("train") if newest is not None else {}
    if not isinstance(section, dict):
        raise _damaged(newest, "train", begun_with)
    precision, say = settle(config.precision, section.get("precision"), config.cluster.gpus > 0)
    config = replace(config, data=data, network=network, precision=precision)
    config, of_labels = settle_labels(config, dataset)
    lines = [line, *of_labels, config.network.describe(dataset.image_shape), *([say] if say else [])]
    return config, lines


def _data(data: DataConfig, num_rows: int, begun_with: int | None) -> tuple[DataConfig, str]:
    """What is held out and what is validated on; `begun_with` is the `hold_out` of the training that is continued."""
    every, validation = data.hold_out, data.validation
    if every is None:
        every = begun_with
    if validation == "auto" and data.train == DIGITS and not every:
        validation = DIGITS_TEST
    elif validation in ("auto", HELD_OUT) and every is None:
        every = HoldOut.usual(num_rows).every
    if validation == "auto":
        validation = HELD_OUT if every else None
    hold_out = HoldOut(num_rows, every or 0)
    if validation == HELD_OUT and len(hold_out.ids) == 0:
        rule = f"holds out none of {num_rows:,} rows; give a data.hold_out that is at most {num_rows}, or no validation"
        require(False, "data.validation", HELD_OUT, rule)
    if hold_out.every:
        line = (
            f"held out: {len(hold_out.ids):,} of the {num_rows:,} rows of {data.train}, one of every {hold_out.every}; "
            f"they are never trained on{', and validated on' if validation == HELD_OUT else ''}"
        )
    elif validation is None and data.validation == "auto":
        few = f"{num_rows:,} row(s) are too few to hold any out" if begun_with is None else "the run holds out no rows"
        line = f"no validation: {few}; name a data set with --data.validation"
    else:
        line = f"validation: {validation or 'none'}"
    return replace(data, hold_out=hold_out.every, validation=validation), line


def _damaged(newest: Checkpoint | None, section: str, begun_with: dict[str, Any]) -> CheckpointError:
    where = newest.location.uri if newest is not None else "checkpoint"
    found = repr(begun_with.get(section))[:100]
    return CheckpointError(f"{where}/state.json: config.{section} = {found}: is damaged; restore the checkpoint")


def made_from(config: TrainConfig, dataset: PreparedDataset, newest: Checkpoint | None) -> dict[str, str]:
    """Tags of the MLflow run: with nothing saved, another config or other data make another training and curve."""
    learned = newest.state["config"] if newest is not None else config.semantic()
    return {"ddpm.config_hash": digest(learned), "ddpm.dataset_id": dataset.dataset_id}
