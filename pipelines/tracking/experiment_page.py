"""What MLflow shows of an experiment: its description, and the columns of its table of runs.

MLflow's table of runs shows the same few attributes for every experiment. Which other columns it shows is kept by the
browser or, when a view of the table is shared, in a tag of the experiment that a link names; here such a view is shared
from the beginning.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """Description in Markdown, where {name} is the model's and {runs} the link to the table; columns of the table, in
    their order, as kind and name. A column that no run has is not shown."""

    description: str
    columns: tuple[str, ...]

    @property
    def view(self) -> dict[str, Any]:
        """The table as MLflow stores it: which columns, their order and widths (pixels)."""
        kinds_and_names = [column.split(" ", 1) for column in self.columns]
        columns = {f"{kind}.`{name}`": min(190, max(90, 6 * len(name) + 24)) for kind, name in kinds_and_names}
        return {
            "selectedColumns": list(columns),
            "columnOrder": [*_FIRST_COLUMNS, *columns],
            "columnWidths": columns,
        }


PAGES = {
    "train": ExperimentPage(
        "Trainings of **{name}** (`jobs/train.py`), one run each, whatever interrupted it. "
        "[Their table]({runs}) shows bits/dim of the validation images (lower is better), by which bound, "
        "what was trained, steps, images/s, and what the same images take without a model: as PNG files and as "
        "independent pixels. A run's description has its result and samples; `NAME/eval` holds evaluations of the "
        "models of the training NAME, `NAME/samples` sample sets, `NAME/quality` how good they are, `NAME/encodings` "
        "images as noise.",
        (
            "metrics validation/bits_per_dim",
            "tags ddpm.bound",
            "tags ddpm.trained_as",
            "tags ddpm.step",
            "metrics images_per_second",
            "metrics without_model/png",
            "metrics without_model/independent_pixels",
            "metrics train/loss",
            "params batch_size",
            "params train.learning_rate",
        ),
    ),
    "evaluate": ExperimentPage(
        "Evaluations of models of **{name}** (`jobs/evaluate.py`), one run each. [Their table]({runs}) shows bits/dim "
        "(lower is better; `bpd/bound` is that of whichever bound was asked for, `bpd/given_label` the same given the "
        "images' labels), the step of the model, how many images, images/s, and what the same images take without a "
        "model: as PNG files and as independent pixels (histogram). A run's description and its artifact "
        "`report/index.html` have the whole result. Models of different names or kinds: select their experiments, then "
        "their runs, and compare the charts `bpd/...`, which all have.",
        (
            "metrics bpd/bound",
            "metrics bpd/given_label",
            "metrics class/accuracy",
            "metrics bits_per_dim/continuous",
            "metrics bits_per_dim/learned",
            "metrics bits_per_dim/beta_tilde",
            "metrics bits_per_dim/beta",
            "tags ddpm.step",
            "metrics eval/num_images",
            "metrics images_per_second",
            "metrics bpd/png",
            "metrics bpd/histogram",
            "tags ddpm.model",
            "params estimator",
        ),
    ),
    "sample": ExperimentPage(
        "Sample sets by models of **{name}** (`jobs/sample.py`), one run each. [Their table]({runs}) shows how many "
        "images, images/s, and how they were made. A run's description has a preview.",
        (
            "metrics sample/images",
            "metrics images_per_second",
            "params sampler",
            "params steps",
            "params labels",
            "params guidance_scale",
            "params seed",
            "tags ddpm.model",
        ),
    ),
    "quality": ExperimentPage(
        "Samples of **{name}** compared with a reference (`jobs/quality.py`), one run each. [Their table]({runs}) has "
        "the numbers with their 95% intervals: distances (lower is better), precision, recall, density and coverage "
        "(higher is better), whether training images are repeated, and how it was measured. Numbers compare only where "
        "`ddpm.protocol` is the same, which is also in the name of their metrics. A run's description and its artifact "
        "`report/index.html` have the whole result.",
        (
            "params sampler",
            "metrics evaluations_per_image",
            "tags quality.fd",
            "tags quality.fd_limit",
            "tags quality.kid",
            "tags quality.precision",
            "tags quality.recall",
            "tags quality.density",
            "tags quality.coverage",
            "tags quality.memorised",
            "tags ddpm.protocol",
            "tags ddpm.extractor",
            "tags ddpm.step",
            "tags ddpm.model",
        ),
    ),
    "encode": ExperimentPage(
        "Images as noise by models of **{name}** (`jobs/encode.py`), one run each. [Their table]({runs}) shows how far "
        "an image is from what its noise leads back to (`round_trip/...`: rms over its pixels in grey levels, lower is "
        "better), how many images, images/s, and how they were encoded. A run's description has a picture.",
        (
            "metrics round_trip/mean_rms",
            "metrics round_trip/median_rms",
            "metrics round_trip/worst_rms",
            "metrics encode/images",
            "metrics images_per_second",
            "params sampler",
            "params steps",
            "params clip_x_0",
            "params labels",
            "params precision",
            "tags ddpm.model",
        ),
    ),
}


def table_link(experiment_id: str) -> str:
    """The table of an experiment's runs, with its columns: the part of the address after the server's."""
    return f"/#/experiments/{experiment_id}/runs?{_QUERY}"


def write_page(client: "MlflowClient", experiment: "Experiment", job: str) -> None:
    """Describe the experiment of a job (a key of `PAGES`) and share the view of its table, unless that is done, or a
    person has described it; any other job has no page."""
    page = PAGES.get(job)
    if page is None:
        return
    if NOTE_TAG not in experiment.tags:
        name = str(experiment.name)
        for suffix in ("/eval", "/samples", "/encodings", "/quality"):
            name = name.removesuffix(suffix)
        text = page.description.replace("{name}", name)
        text = text.replace("{runs}", table_link(experiment.experiment_id).removeprefix("/"))
        client.set_experiment_tag(experiment.experiment_id, NOTE_TAG, text)
    if _VIEW_TAG not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, _VIEW_TAG, json.dumps(page.view))
