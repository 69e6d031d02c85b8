"""What MLflow shows of an experiment: its description, and the columns of its table of runs.

MLflow's table of runs shows the same few attributes for every experiment. Which other columns it shows is kept by the
browser or, when a view of the table is shared, in a tag of the experiment that a link names; here such a view is shared
from the beginning.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

NOTE_TAG = "mlflow.note.content"
_VIEW = "ddpm"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
_FIRST_COLUMNS = ("attributes.`Run Name`", "runDateAndNestInfo", "duration")  # are always there
# What opens the table of runs; without it MLflow 3 opens its pages for language models.
_QUERY = f"compareRunsMode=TABLE&viewStateShareKey={_VIEW}&workflowType=machine_learning"


@dataclass(frozen=True)
class ExperimentPage:
    """Description in Markdown, where {name} is the model's and {runs} the link to the table; metrics, tags and
    parameters that are columns of the table, in their order. A column that no run has is not shown."""

    description: str
    metrics: tuple[str, ...]
    tags: tuple[str, ...] = ()
    params: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """As MLflow names them."""
        kinds = {"metrics": self.metrics, "tags": self.tags, "params": self.params}
        return [f"{kind}.`{name}`" for kind, names in kinds.items() for name in names]


PAGES = {
    "train": ExperimentPage(
        "Trainings of **{name}** (`jobs/train.py`), one run each, whatever interrupted it. "
        "[Their table]({runs}) shows bits/dim of the validation images (lower is better), beside what the same images "
        "take as PNG files and as independent pixels, steps and images/s. A run's description has its result and "
        "samples; `{name}/eval` holds evaluations of its models, `{name}/samples` sample sets.",
        (
            "validation/beta_tilde/bits_per_dim",
            "validation/beta/bits_per_dim",
            "validation/bits_per_dim_of_png",
            "validation/bits_per_dim_of_independent_pixels",
            "train/loss",
            "images_per_second",
        ),
        ("ddpm.step",),
        ("train.batch_size", "train.learning_rate"),
    ),
    "evaluate": ExperimentPage(
        "Evaluations of models of **{name}** (`jobs/evaluate.py`), one run each. [Their table]({runs}) shows bits/dim "
        "(lower is better), beside what the same images take as PNG files and as independent pixels, and the step of "
        "the model. A run's description and its artifact `report/index.html` have the whole result.",
        (
            "bits_per_dim/beta_tilde",
            "bits_per_dim/beta",
            "bpd/png",
            "bpd/histogram",
            "eval/num_images",
            "images_per_second",
        ),
        ("ddpm.step", "ddpm.model"),
        ("estimator",),
    ),
    "sample": ExperimentPage(
        "Sample sets by models of **{name}** (`jobs/sample.py`), one run each. [Their table]({runs}) shows how many "
        "images, how they were made, and images/s. A run's description has a preview.",
        ("sample/images", "images_per_second"),
        ("ddpm.model",),
        ("sampler", "steps", "seed"),
    ),
}


def table_link(experiment_id: str) -> str:
    """The table of an experiment's runs, with its columns: the part of the address after the server's."""
    return f"/#/experiments/{experiment_id}/runs?{_QUERY}"


def write_page(client: "MlflowClient", experiment: "Experiment", job: str) -> None:
    """Describe the experiment of a job ('train', 'evaluate', 'sample') and share the view of its table, unless that is
    done, or a person has described it; any other job has no page."""
    page = PAGES.get(job)
    if page is None:
        return
    if NOTE_TAG not in experiment.tags:
        name = str(experiment.name).removesuffix("/eval").removesuffix("/samples")
        text = page.description.replace("{name}", name)
        text = text.replace("{runs}", table_link(experiment.experiment_id).removeprefix("/"))
        client.set_experiment_tag(experiment.experiment_id, NOTE_TAG, text)
    if _VIEW_TAG not in experiment.tags:
        columns = page.columns
        widths = {column: max(100, 9 * len(column.split("`")[1])) for column in columns}
        view = {"selectedColumns": columns, "columnOrder": [*_FIRST_COLUMNS, *columns], "columnWidths": widths}
        client.set_experiment_tag(experiment.experiment_id, _VIEW_TAG, json.dumps(view))
