"""What a comparison says of itself: to the terminal and to MLflow; and whether it makes its model the champion."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.cli.console import with_interval
from pipelines.cli.errors import TrackingError
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.quality.config import QualityConfig
from pipelines.quality.features import described
from pipelines.quality.inputs import Inputs
from pipelines.quality.names import NUMBERS, interval_metrics, metric_of, title_of
from pipelines.quality.request import QualityRequest
from pipelines.storage.location import Location
from pipelines.tracking.champion import promote_by_metric
from pipelines.tracking.tracker import resolve_tracking_uri


def records_of(
    location: Location, request: QualityRequest, inputs: Inputs, measured: Mapping[str, Any], files: Sequence[str]
) -> list[Record]:
    """Metrics, report, description, and the point on the curve of the run that trained the model, for MLflow."""
    numbers, names = measured["all"]["numbers"], inputs.label_names
    values = {metric_of(name, request): found["value"] for name, found in numbers.items()}
    for name, found in numbers.items():
        values |= dict(zip(interval_metrics(name, request), (found["low"], found["high"]), strict=True))
    for label, of_class in measured["classes"].items():
        name_of = names[int(label)] if int(label) < len(names) else None
        values |= {metric_of(n, request, int(label), name_of): f["value"] for n, f in of_class["numbers"].items()}
    for space, found in measured.get("memorisation", {}).items():
        stamp = f"{space}.{request.memory_stamp}"
        values |= {f"memorised/{what}.{stamp}": found[what]["value"] for what in ("closer", "near", "near_by_ratio")}
    values["duplicates/by_digest"] = measured["duplicates"]["by_digest"]
    if inputs.evaluations is not None:
        values["evaluations_per_image"] = inputs.evaluations
    tags = {f"quality.{name}": with_interval(found) for name, found in numbers.items()}
    if "memorisation" in measured:
        tags["quality.memorised"] = memorised_in_words(measured)
    records = [Record("metrics", {"step": 0, "values": values}), Record("tags", {"values": tags})]
    records.append(Record("artifact", {"path": (location / "report").uri, "artifact_path": "report"}))
    model, reference = inputs.model, inputs.sets["reference"]
    if model is not None:
        points = {metric_of(name, request): found["value"] for name, found in numbers.items()}
        dataset = {"name": reference.location.uri, "digest": reference.dataset_id}
        evaluated = {"model_id": model.found.model_id, "step": model.step or 0, "values": points, "dataset": dataset}
        records.append(Record("evaluated", evaluated))
    return [*records, Record("note", {"markdown": _note(request, inputs, measured, files)})]


def _note(request: QualityRequest, inputs: Inputs, measured: Mapping[str, Any], files: Sequence[str]) -> str:
    sets = inputs.sets
    numbers = measured["all"]["numbers"]
    lines = [f"| {title_of(name, request)} | {with_interval(found)} |" for name, found in numbers.items()]
    note = (
        f"**{headline_of(request, measured)}**\n\n`{sets['samples'].location}` against `{sets['reference'].location}`, "
        f"by {described(request.extractor)}; protocol `{request.stamp}`. The whole report: artifact "
        "`report/index.html`.\n\n| What | Value (95%) |\n|---|---|\n" + "\n".join(lines)
    )
    note += f"\n\nDuplicates among the samples: {measured['duplicates']['by_digest']:,}."
    if "memorisation" in measured:
        note += f" Memorisation: {memorised_in_words(measured)}."
    pictures = [name for name in files if name.endswith(".png")]
    return note + "".join(f"\n\n![{name}](get-artifact?path=report/{name}&run_uuid={{run_id}})" for name in pictures)


def headline_of(request: QualityRequest, measured: Mapping[str, Any]) -> str:
    """The number that matters, with its interval and what it was measured by, in one line."""
    name = request.headline
    sizes = f"{measured['all']['num_samples']:,} samples, {measured['all']['num_reference']:,} reference images"
    number = f"{title_of(name, request)} {with_interval(measured['all']['numbers'][name])}"
    return f"{number}, {request.extractor.name}, {sizes}"


def memorised_in_words(measured: Mapping[str, Any]) -> str:
    """Whether samples repeat training images, for a person."""
    found = measured["memorisation"]
    alarms = [space for space, of_space in found.items() if of_space["alarm"]]
    shares = "; ".join(
        f"in {space} {in_percent(each['near'])}, by the ratio to the second nearest {in_percent(each['near_by_ratio'])}"
        for space, each in found.items()
    )
    verdict = f"ALARM in {' and '.join(alarms)}" if alarms else "no alarm"
    return f"{verdict}; samples closer to a training image than 99% of unseen images: {shares}"


def in_percent(found: Mapping[str, float]) -> str:
    """A share with its 95% interval, in per cent."""
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def summary_rows(location: Location, request: QualityRequest, measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The closing summary, as (name, value)."""
    numbers, left_out = measured["all"]["numbers"], measured["all"]["left_out"]
    rows = [("result", headline_of(request, measured))]
    for name in NUMBERS:
        if name in numbers:
            rows.append((title_of(name, request), with_interval(numbers[name])))
        elif name in left_out:
            rows.append((title_of(name, request), f"left out: {left_out[name]}"))
    if measured["classes"]:
        rows.append(("by label", f"{len(measured['classes'])} classes, in the report"))
    rows.append(("duplicates", f"{measured['duplicates']['by_digest']:,} samples repeat an earlier one"))
    if "memorisation" in measured:
        rows.append(("memorisation", memorised_in_words(measured)))
    return [
        *rows,
        ("features", f"{described(request.extractor)}, protocol {request.stamp}"),
        ("report", (location / "report" / "index.html").uri),
    ]


def promote(
    model: UsedModel | None,
    config: QualityConfig,
    experiment: str,
    request: QualityRequest,
    measured: Mapping[str, Any] | None,
) -> str:
    """Make the samples' model the champion if its distance is lower beyond doubt; None asks whether that can be told.

    Raises:
        TrackingError: See `promote_by_metric`; the samples do not say which model made them.
    """
    if model is None:
        raise TrackingError("promote: the samples are no sample set, which would say which model made them")
    uri = resolve_tracking_uri(config.tracking.uri, Location.parse(config.root).local_path)
    interval = None
    if measured is not None:
        found = measured["all"]["numbers"][request.headline]
        interval = found["low"], found["high"]
    metrics = interval_metrics(request.headline, request)
    return promote_by_metric(uri, model.found.name, experiment, model.found.model_id, metrics, interval)
