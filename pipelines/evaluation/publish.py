"""What an evaluation says of itself: to the terminal, to MLflow, and in the report's notes."""

import math
from collections.abc import Mapping
from typing import Any

from ddpm_core.likelihood import GIVEN_LABEL, untold_name
from ddpm_core.process.base import Process
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.class_report import class_metrics, classification_of, label_rows
from pipelines.evaluation.names import BOUND_METRIC, GIVEN_LABEL_METRIC, label_name, label_of, metric_of
from pipelines.evaluation.report import headline_of, table_rows
from pipelines.evaluation.request import ClassifierRequest, EvaluateRequest
from pipelines.evaluation.results import BANDWIDTH, Evaluation
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.outputs.version import code_version
from pipelines.storage.location import Location
from pipelines.tracking.champion import IMAGES_METRIC, interval_metrics

_BASELINES = ("png", "webp", "histogram")
# MLflow cuts a description at 8,000 characters.
_NOTE_ROWS = 40
_SHOWN_LABELS = 20
_BOUNDS_TOLD = {
    "given": " The model is told each image's label; an image without one has the null class.",
    "null": " The model is told no label.",
    "both": " With each image's label and, on the same noise, without: what the label tells is their difference.",
}


def records_of(
    location: Location, request: EvaluateRequest, evaluation: Evaluation, data: PreparedDataset, model: UsedModel
) -> list[Record]:
    """Metrics, curves, report, description, and the links to model and data set, for MLflow."""
    summary, found, curve = evaluation.summary, model.found, evaluation.curve
    bound, headline = summary["headline"].removeprefix("bits_per_dim."), summary["means"][summary["headline"]]
    names = summary.get("label_names") or ()
    scalars = {metric_of(name, bound, names): measured["mean"] for name, measured in summary["means"].items()}
    scalars[GIVEN_LABEL_METRIC if bound.startswith(GIVEN_LABEL) else BOUND_METRIC] = headline["mean"]
    for kind in ("given_images", "data_set", "population"):
        if headline[kind] is not None:
            scalars |= dict(zip(interval_metrics(kind, bound), headline[kind], strict=True))
    if tells := summary["means"].get(f"label_tells.{untold_name(bound)}"):
        scalars |= dict(zip(("tells/low", "tells/high"), tells["data_set"] or (), strict=False))
    scalars |= class_metrics(summary)
    scalars |= {IMAGES_METRIC: summary["num_images"], "eval/network_evaluations": summary["network_evaluations"]}
    records = [Record("metrics", {"step": 0, "values": scalars})]
    if curve.t is not None:
        for t, kl, mse in zip(curve.t.tolist(), curve.kl, curve.eps_mse, strict=True):
            values = {f"eval_by_t/kl_bits_per_dim.{bound}": kl, "eval_by_t/eps_mse": mse}
            records.append(Record("metrics", {"step": t, "values": values}))
    for log_snr, mse in curve.eps_mse_by_log_snr().items():
        records.append(Record("metrics", {"step": log_snr, "values": {"eval_by_log_snr/eps_mse": mse}}))
    records.append(Record("artifact", {"path": (location / "report").uri, "artifact_path": "report"}))
    point = {metric_of(summary["headline"], bound): headline["mean"]}
    dataset = {"name": data.location.uri, "digest": request.dataset_id}
    evaluated = {"model_id": found.model_id, "step": model.step or 0, "values": point, "dataset": dataset}
    records.append(Record("evaluated", evaluated))
    columns = ("label", "mean", "data_set", "population")
    lines = [f"| {' | '.join(row[name] for name in columns)} |" for row in table_rows(summary)[:_NOTE_ROWS]]
    columns = ("label", "num_images", "mean", "population")
    by_label = [f"| {' | '.join(row[name] for name in columns)} |" for row in label_rows(summary)[:_NOTE_ROWS]]
    note = (
        f"**{headline_of(summary)}**\n\nModel `{found.model_id[:12]}` (`{found.uri}`, step {model.step}) on "
        f"`{data.location}`. The whole report: artifact `report/index.html`.\n\n"
        "![terms over t](get-artifact?path=report/by_t.png&run_uuid={run_id})\n\n"
        "Images with the fewest bits above, with the most below:\n\n"
        "![images](get-artifact?path=report/extremes.png&run_uuid={run_id})\n\n"
        "| What | Mean | ± data set | ± population |\n|---|---|---|---|\n" + "\n".join(lines)
    )
    if by_label:
        note += "\n\n| Label | Images | Mean | ± population |\n|---|---|---|---|\n" + "\n".join(by_label)
    if "classification" in summary:
        picture = "get-artifact?path=report/{}.png&run_uuid={{run_id}}"
        note += f"\n\n**{classification_of(summary)}**\n\n![confusion]({picture.format('confusion')})\n\n"
        note += f"![calibration]({picture.format('calibration')})"
    return [*records, Record("note", {"markdown": note})]


def calibration_notes(request: EvaluateRequest, summary: Mapping[str, Any], process: Process) -> list[str]:
    """How the numbers came about, a sentence each; `process` is the model's own."""
    target, k = request.target_halfwidth, request.timesteps_per_image
    spread = "spread evenly over groups of 16 images, in two independent replicates; L_0 twice."
    how = {
        "all": f"Every t, {request.draws} draw(s) each.",
        "stratified": f"{k} time steps per image, stratified uniformly in log-SNR and {spread}",
        "importance": f"{k} time steps per image, by importance (root mean square of the term in a first pass with "
        f"noise of its own) and {spread}",
    }[request.estimator]
    how += _BOUNDS_TOLD.get(request.labels or "", "")
    whole = request.num_images is None and target is None
    which = f"the {'rows that the training held out' if request.hold_out else 'images'} of the data set"
    notes = [
        how,
        _evaluations(summary),
        f"All {which}, in its order." if whole else f"A part of {which}, in a fixed pseudo-random order.",
        *_about_the_bound(summary),
        *_what_follows(request, summary, process),
        "PNG and WebP: whole files, one per image. Independent pixels: each place's histogram over training images.",
    ]
    if target is not None:
        found = summary["means"][summary["headline"]]
        half = (found["data_set"][1] - found["mean"]) if found["data_set"] else math.inf
        reached = half <= target
        advice = (
            ""
            if reached
            else f"; the images are used up, raise timesteps_per_image about {(half / target) ** 2:.1f} times"
        )
        notes.append(f"Target half-width {target}: {'reached' if reached else f'not reached ({half:.4f})'}{advice}.")
    if request.classifier is not None:
        notes.append(_about_classes(request.classifier, summary))
    if request.ode.num_images:
        of_what = (
            "exact likelihood of uniformly dequantised images"
            if isinstance(process, DiscreteProcess)
            else "the flow in the place of the diffusion, with the same prior and the same softmax decoder of z_0"
        )
        notes.append(
            f"ODE: {of_what}, Heun with {request.ode.steps} steps, {request.ode.probes} random vectors for the trace, "
            f"on the first {request.ode.num_images} images. Trace error: standard error over the vectors, mean over "
            "images; step error: difference to half as many steps (bits/dim is too low by about a third of it)."
        )
    return notes


def _about_classes(asked: ClassifierRequest, summary: Mapping[str, Any]) -> str:
    found = summary["classification"]
    names = {label: label_name(str(label), summary).removeprefix("label ") for label in asked.classes}
    prior = (
        "the same for all"
        if asked.prior is None
        else ", ".join(f"{names[label]} {share:.3g}" for label, share in zip(asked.classes, asked.prior, strict=True))
    )
    given_up = (
        "no class is given up"
        if asked.separation is None
        else f"a class is given up when the best one leads it by {asked.separation:g} standard errors, and "
        f"{found['undecided']:,} images were not decided at the end"
    )
    return (
        f"Classification: argmax of -ELBO(x | c) + ln prior(c) over {len(asked.classes)} classes, all on the same "
        f"noise; prior: {prior}. At most {asked.rounds} rounds of {asked.timesteps_per_round} time steps, and L_0 "
        f"once, for each class; {given_up}."
    )


def _evaluations(summary: Mapping[str, Any]) -> str:
    done, full = summary["network_evaluations"], summary["network_evaluations_of_full_sum"]
    if full is None:
        return f"{done:,} network evaluations."
    return (
        f"{done:,} network evaluations; every t once for the same images would have taken {full:,} "
        f"({full / done:.1f} times as many)."
    )


def _about_the_bound(summary: Mapping[str, Any]) -> list[str]:
    """What its parts are, and the decoder."""
    if summary["bound"]["decoder"] == "gaussian":
        parts = "L_T + sum of L_{t-1} + L_0"
        decoder = "the discretised Gaussian"
    else:
        in_steps = summary["bound"]["num_timesteps"] is not None
        parts = "L_T + sum of L_{t-1} + L_0" if in_steps else "L_T + diffusion term + L_0"
        decoder = "the softmax over the 256 levels around z_0"
    return [f"L_T is exact. ELBO = {parts}, an upper bound of -log2 p per dimension; the decoder is {decoder}."]


def _what_follows(request: EvaluateRequest, summary: Mapping[str, Any], process: Process) -> list[str]:
    """Which other bounds there are without another call of the network, and why there are no more."""
    means, notes = summary["means"], []
    bound = untold_name(summary["headline"].removeprefix("bits_per_dim."))
    averaged = f" The ε-errors are averaged over ± {BANDWIDTH} in log-SNR."
    if any(name.endswith(".optimal") for name in means):
        notes.append(
            "σ² = optimal: estimated on one half of the images and scored on the other, both ways; for L_0 the best of "
            "a grid."
        )
    if bound == "continuous":
        notes.append(
            "In T steps: predicted from the same ε-errors for steps of γ(t) at t = 1/T ... 1, each with its posterior "
            f"variance.{averaged}"
        )
    elif "." not in bound and any(name.endswith(".beta_tilde") and ".steps_" in name for name in means):
        notes.append(
            "In K steps: predicted from the same ε-errors for K evenly spaced time steps with each step's posterior "
            "variance, unclipped; L_0 is that of β̃ in the full sequence."
            + ("" if request.estimator == "all" else averaged)
        )
    if bound.endswith("learned"):
        notes.append("Under learned σ² no other number of steps follows: the network predicts them for these steps.")
    if process.prior_signal == 0.0:
        notes.append(
            "The SNR ends at 0, where z is all noise: its ε-error says nothing of that step, so other variances and "
            "fewer steps do not follow."
        )
    return notes


def provenance(model: UsedModel, data: PreparedDataset, train: PreparedDataset | None) -> list[tuple[str, str]]:
    """Model, data and code, as (name, value)."""
    found, trained_on = model.found, model.trained_on
    return [
        ("model", f"{found.uri} (id {found.model_id}, step {model.step})"),
        ("trained on", f"{trained_on.get('uri')} (id {trained_on.get('id')})"),
        ("training run", str(found.run_id)),
        ("evaluated on", f"{data.location} (id {data.dataset_id}, {data.num_rows:,} images)"),
        (
            "histogram of",
            f"{train.location} (id {train.dataset_id})" if train else "no training data",
        ),
        ("code", f"{code_version()}; the model was trained by {model.lineage['code_version']}"),
    ]


def summary_rows(location: Location, model: str, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The closing summary, as (name, value); `model` says which one it is."""
    summary = manifest["results"]
    means = summary["means"]
    done, full = summary["network_evaluations"], summary["network_evaluations_of_full_sum"]
    every_t = "" if full is None else f" (every t once: {full:,})"
    bound = summary["headline"].removeprefix("bits_per_dim.")
    parts = [(label_of(name, summary), means[name]["mean"]) for name in ("L_T", f"L_t_sum.{bound}", f"L_0.{bound}")]
    baselines = {name: means.get(f"bits_per_dim.{name}") for name in _BASELINES}
    known = [f"{name} {baseline['mean']:.4f}" for name, baseline in baselines.items() if baseline]
    more = []
    if tells := means.get(f"label_tells.{untold_name(bound)}"):
        half = "" if tells["data_set"] is None else f" ± {tells['data_set'][1] - tells['mean']:.4f}"
        null = means[f"bits_per_dim.{untold_name(bound)}"]["mean"]
        more.append(("labels", f"tell {tells['mean']:.4f}{half} bits/dim; of the null class {null:.4f}"))
    if labels := label_rows(summary):
        by_mean = sorted(labels, key=lambda row: float(row["mean"]))
        shown = labels if len(labels) <= _SHOWN_LABELS else [by_mean[0], by_mean[-1]]
        told = ", ".join(f"{row['label']} {row['mean']} ± {row['population']}" for row in shown)
        more.append(("by label", told if shown is labels else f"{len(labels)}, lowest and highest: {told}"))
    if "classification" in summary:
        more.append(("classes", classification_of(summary)))
    return [
        ("result", headline_of(summary)),
        *more,
        ("terms", ", ".join(f"{label.split(',')[0]} {value:.4f}" for label, value in parts)),
        ("baselines", ", ".join(known)),
        ("evaluations", f"{done:,} of the network{every_t}"),
        ("model", model),
        ("report", (location / "report" / "index.html").uri),
    ]
