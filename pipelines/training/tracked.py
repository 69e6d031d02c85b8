"""What MLflow learns of a training from its driver: what it is at the beginning, what it has made at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.cli.config import as_dict, digest
from pipelines.cli.console import event, plus_minus
from pipelines.models.checkpoints import CheckpointStore
from pipelines.outputs.version import git_commit
from pipelines.storage.location import Location
from pipelines.tracking.spool import Record, Spool
from pipelines.tracking.tracker import Tracker
from pipelines.training.checks import Checked
from pipelines.training.config import HELD_OUT, TrainConfig, TrainJob
from pipelines.training.words import bound_in_words, trained_as

_CODERS = {"png": "PNG", "independent_pixels": "independent pixels"}


def open_tracker(checked: Checked, listener: Callable[[Record], None]) -> Tracker:
    """The tracker of the training's MLflow run; `listener` hears what is spooled.

    The spool lies in a local run directory; that of a run in object storage beside this machine's other ones, with a
    copy in the run directory.
    """
    config, run, root = checked.job.config, Location.parse(checked.job.run), Location.parse(checked.job.config.root)
    return Tracker(
        spool_of(config),
        run_key=_key_of(run),
        experiment=config.tracking.experiment or config.name,
        run_name=config.name,
        root=local_root(root),
        tracking_uri=config.tracking.uri,
        notify=event,
        listener=listener,
        mirror=None if run.is_local else run / "tracking" / "spool.jsonl",
        made_from=checked.made_from,
    )


def spool_of(config: TrainConfig) -> Path:
    """Where the spool of the training of this name lies on this machine; its lock tells whether it runs."""
    root = Location.parse(config.root)
    run = root / "runs" / config.name
    directory = Path(run.path) / "tracking" if run.is_local else local_root(root) / "spool" / digest(_key_of(run))[:16]
    return directory / "spool.jsonl"


def _key_of(run: Location) -> str:
    return f"train/{run.uri}"


def local_root(root: Location) -> Path:
    """Where this machine keeps the database and the spools of what lies under `root`."""
    return Path(root.path) if root.is_local else Path.home() / "ddpm"


def announce(spool: Spool, checked: Checked) -> None:
    """What this run is: parameters, data sets, tags that say where it comes from."""
    job, config = checked.job, checked.job.config
    spool.append("params", values=_flat(as_dict(config)))
    for context, dataset in (("training", checked.train_set), ("validation", checked.validation_set)):
        if dataset is not None:
            uri = dataset.location.uri
            part = context == "validation" and config.data.validation == HELD_OUT
            name = f"{uri} (held-out rows)" if part else uri
            spool.append("dataset", name=name, digest=dataset.dataset_id, uri=uri, context=context)
    tags = {
        "ddpm.job": "train",
        **checked.made_from,
        "ddpm.code_version": job.code_version,
        "ddpm.run": job.run,
        "mlflow.source.name": "jobs/train.py",
        "mlflow.source.type": "JOB",
    }
    if config.tracking.parent is not None:
        tags["mlflow.parentRunId"] = config.tracking.parent
    if commit := git_commit():
        tags["mlflow.source.git.commit"] = commit
    spool.append("tags", values=tags)


def register(spool: Spool, job: TrainJob, result: dict[str, Any]) -> None:
    """The final model, grid and headline, from the `result` that the workers left (`run_directory.read_result`)."""
    scores = result["validation"]
    # What a full disk refused to Ray Train's controller at the end went with its process; MLflow keeps one of each.
    for record in CheckpointStore.open(job.run).load(result["step"]).state["records"]:
        spool.append(**record)
    metrics = {}
    headline, kind = f"**{result['step']:,} steps**", trained_as(job, result["step"])
    tags = {"ddpm.step": result["step"], "ddpm.trained_as": kind}
    if scores:
        tags["ddpm.bound"] = bound_in_words(scores["sigma2"], job.config.diffusion.table_length)
        metrics = {f"validation/{scores['sigma2']}/bits_per_dim": scores["total"]}
        headline = (
            f"**{plus_minus(scores['total'], scores['standard_error'])} bits/dim** ({scores['num_images']} validation "
            f"images; {tags['ddpm.bound']}; standard error over images) after {headline}"
        )
        if baselines := scores.get("baselines"):
            headline += f"; without a model the same images take: {baselines_line(baselines)}"
            values = {f"without_model/{name}": value for name, value in baselines.items()}
            spool.append("metrics", step=result["step"], values=values)
    if rows := result.get("rows"):
        spool.append("metrics", step=result["step"], values={"repeated_rows": rows["repeats"]})
        headline += f"; {rows_in_words(rows)}"
    spool.append("tags", values=tags)
    pictures = f"![samples]({_shown(spool, result['grid'], 'grids')})"
    if schedule := result.get("noise_schedule"):
        pictures += f"\n\n![learned noise schedule]({_shown(spool, schedule, 'noise_schedules')})"
    spool.append(
        "model",
        uri=result["model"],
        name=registered_name(job),
        model_id=result["model_id"],
        step=result["step"],
        metrics=metrics,
        validation=scores,
        dataset={"name": job.train, "digest": result["dataset_id"]},
    )
    spool.append(
        "note",
        markdown=f"{headline}\n\nModel `{result['model_id'][:12]}` at `{result['model']}`, "
        f"{result['parameters']:,} parameters: {kind}, on `{job.train}`.\n\n{pictures}",
    )


def _shown(spool: Spool, picture: str, folder: str) -> str:
    """Where MLflow shows a picture that becomes an artifact in this folder."""
    spool.append("artifact", path=picture, artifact_path=folder)
    return f"get-artifact?path={folder}/{Location.parse(picture).name}&run_uuid={{run_id}}"


def registered_name(job: TrainJob) -> str:
    """What the model is called in MLflow's registry."""
    return job.config.tracking.model_name or job.config.name


def baselines_line(found: dict[str, float]) -> str:
    """Bits/dim without a model, by coder, in words."""
    return ", ".join(f"{label} {found[name]:.4f}" for name, label in _CODERS.items() if name in found)


def rows_in_words(rows: dict[str, int]) -> str:
    """How many rows a training with balanced classes has used, and how many of them were repeats.

    >>> rows_in_words({"used": 64000, "repeats": 3517})
    '64,000 rows used, 3,517 of them repeats that balance the classes'
    """
    return f"{rows['used']:,} rows used, {rows['repeats']:,} of them repeats that balance the classes"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
