"""What an evaluation says of itself: to the terminal, to MLflow, and in the report's notes."""

import math
import re
from collections.abc import Mapping
from typing import Any

from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.report import headline_of, label_of, table_rows
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import BANDWIDTH, Evaluation
from pipelines.models.used import UsedModel
from pipelines.outputs.attempt import Record
from pipelines.outputs.version import code_version
from pipelines.storage.location import Location
from pipelines.tracking.champion import IMAGES_METRIC, interval_metrics

_BASELINES = ("png", "webp", "histogram")
# MLflow cuts a description at 8,000 characters.
_NOTE_ROWS = 40


def records_of(
    location: Location, request: EvaluateRequest, evaluation: Evaluation, data: PreparedDataset, model: UsedModel
) -> list[Record]:
    """Metrics, curves, report, description, and the links to model and data set, for MLflow."""
    summary, sigma2, found = evaluation.summary, request.sigma2, model.found
    scalars = {metric_of(name, sigma2): measured["mean"] for name, measured in summary["means"].items()}
    headline = summary["means"][summary["headline"]]
    for kind in ("given_images", "data_set", "population"):
        if headline[kind] is not None:
            scalars |= dict(zip(interval_metrics(kind, sigma2), headline[kind], strict=True))
    scalars |= {IMAGES_METRIC: summary["num_images"], "eval/network_evaluations": summary["network_evaluations"]}
    records = [Record("metrics", {"step": 0, "values": scalars})]
    for t, kl, mse in zip(evaluation.t.tolist(), evaluation.kl_by_t, evaluation.eps_mse_by_t, strict=True):
        values = {f"eval_by_t/kl_bits_per_dim.{sigma2}": kl, "eval_by_t/eps_mse": mse}
        records.append(Record("metrics", {"step": t, "values": values}))
    records.append(Record("artifact", {"path": (location / "report").uri, "artifact_path": "report"}))
    point = {metric_of(summary["headline"], sigma2): headline["mean"]}
    dataset = {"name": data.location.uri, "digest": request.dataset_id}
    evaluated = {"model_id": found.model_id, "step": model.step or 0, "values": point, "dataset": dataset}
    records.append(Record("evaluated", evaluated))
    columns = ("label", "mean", "data_set", "population")
    lines = [f"| {' | '.join(row[name] for name in columns)} |" for row in table_rows(summary)[:_NOTE_ROWS]]
    note = (
        f"**{headline_of(summary)}**\n\nModel `{found.model_id[:12]}` (`{found.uri}`, step {model.step}) on "
        f"`{data.location}`. The whole report: artifact `report/index.html`.\n\n"
        "![terms over t](get-artifact?path=report/by_t.png&run_uuid={run_id})\n\n"
        "Images with the fewest bits above, with the most below:\n\n"
        "![images](get-artifact?path=report/extremes.png&run_uuid={run_id})\n\n"
        "| What | Mean | ± data set | ± population |\n|---|---|---|---|\n" + "\n".join(lines)
    )
    return [*records, Record("note", {"markdown": note})]


def metric_of(name: str, sigma2: str) -> str:
    """The metric in MLflow that is a mean of `Evaluation.summary`, of an evaluation under `sigma2`.

    MLflow puts metrics in the order of their names, and on a narrow page cuts the titles of their charts after seven
    characters: what tells one from the others comes early, and the headline's name is the first of all.

    >>> metric_of("bits_per_dim.beta", "beta"), metric_of("bits_per_dim.beta", "beta_tilde")
    ('bits_per_dim/beta', 'bpd/beta')
    >>> metric_of("bits_per_dim.steps_50.beta_tilde", "beta"), metric_of("L_0.beta", "beta")
    ('bpd/50_steps', 'terms/decoder')
    >>> metric_of("L_0.beta.clipped", "beta"), metric_of("by_label.7.bits_per_dim.beta", "beta")
    ('clip/decoder', 'label/7')
    """
    what, *rest = name.split(".")
    if name == f"bits_per_dim.{sigma2}":
        return f"bits_per_dim/{sigma2}"
    if what in ("ode", "by_label"):
        return f"{what.removeprefix('by_')}/{rest[0]}"
    term = {"L_T": "prior", "L_t_sum": "kl_sum", "L_0": "decoder", "bits_per_dim": "bpd"}[what]
    if rest[-1:] == ["clipped"]:
        return f"clip/{term}"
    if what != "bits_per_dim":
        return f"terms/{term}"
    steps = re.fullmatch(r"steps_(\d+)", rest[0])
    return f"bpd/{steps[1]}_steps" if steps else f"bpd/{rest[0]}"


def calibration_notes(request: EvaluateRequest, summary: Mapping[str, Any]) -> list[str]:
    """How the numbers came about, a sentence each."""
    done, full = summary["network_evaluations"], summary["network_evaluations_of_full_sum"]
    target = request.target_halfwidth
    how = {
        "all": f"Every t, {request.draws} draw(s) each.",
        "stratified": f"{request.timesteps_per_image} time steps per image, stratified uniformly in log-SNR and "
        "spread evenly over groups of 16 images, in two independent replicates; L_0 twice.",
        "importance": f"{request.timesteps_per_image} time steps per image, by importance (root mean square of the "
        "KL in a first pass with noise of its own) and spread evenly over groups of 16 images, in two independent "
        "replicates; L_0 twice.",
    }[request.estimator]
    whole = request.num_images is None and target is None
    which = f"the {'rows that the training held out' if request.hold_out else 'images'} of the data set"
    notes = [
        how,
        f"{done:,} network evaluations; every t once for the same images would have taken {full:,} "
        f"({full / done:.1f} times as many).",
        f"All {which}, in its order." if whole else f"A part of {which}, in a fixed pseudo-random order.",
        "L_T is exact. ELBO = L_T + sum of L_{t-1} + L_0, an upper bound of -log2 p per dimension; the decoder is the "
        "discretised Gaussian.",
        "σ² = optimal: estimated on one half of the images and scored on the other, both ways; for L_0 the best of a "
        "grid.",
        "In K steps: predicted from the same ε-errors for K evenly spaced time steps with each step's posterior "
        "variance, unclipped; L_0 is that of β̃ in the full sequence."
        + ("" if request.estimator == "all" else f" The ε-errors are averaged over ± {BANDWIDTH} in log-SNR."),
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
    if request.ode.num_images:
        notes.append(
            f"ODE: exact likelihood of uniformly dequantised images, Heun with {request.ode.steps} steps, "
            f"{request.ode.probes} random vectors for the trace, on the first "
            f"{request.ode.num_images} images. Trace error: "
            "standard error over the vectors, mean over images; step error: difference to half as many steps "
            "(bits/dim is too low by about a third of it)."
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
    sigma2 = summary["headline"].removeprefix("bits_per_dim.")
    parts = [(label_of(name), means[name]["mean"]) for name in ("L_T", f"L_t_sum.{sigma2}", f"L_0.{sigma2}")]
    baselines = {name: means.get(f"bits_per_dim.{name}") for name in _BASELINES}
    known = [f"{name} {baseline['mean']:.4f}" for name, baseline in baselines.items() if baseline]
    return [
        ("result", headline_of(summary)),
        ("terms", ", ".join(f"{label.split(',')[0]} {value:.4f}" for label, value in parts)),
        ("baselines", ", ".join(known)),
        ("evaluations", f"{done:,} of the network (every t once: {full:,})"),
        ("model", model),
        ("report", (location / "report" / "index.html").uri),
    ]
