"""The evaluation's report: one HTML file without links to elsewhere, and the pictures for MLflow's page of the run."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_core.likelihood import untold_name
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import continuous
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.gamma import LearnedGamma
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.class_report import class_files, classification_of, label_rows, labels_csv
from pipelines.evaluation.names import BASELINES, label_of
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import Evaluation
from pipelines.outputs.figures import figure_files, new_figure
from pipelines.outputs.pictures import grid_png
from pipelines.outputs.report import rendered

_EXTREMES = 16
_CURVES = {
    False: "Mean term at each t: L_0 at t = 0, the KL above it.",
    True: "Diffusion term for each unit of log-SNR, from the data to the noise.",
}


@dataclass(frozen=True)
class Report:
    """Files by name: `index.html`, `by_t.png`, `histogram.png`, `extremes.png`; `by_label.csv`, `confusion.png` and
    `calibration.png` where they are asked for."""

    files: dict[str, bytes]


def headline_of(summary: Mapping[str, Any]) -> str:
    """The number that matters, with its interval, in one line."""
    found, name = summary["means"][summary["headline"]], summary["headline"]
    interval = found["data_set"] or found["population"]
    over = "data set" if found["data_set"] else "population"
    return (
        f"{found['mean']:.4f} ± {_half(found['mean'], interval)} {label_of(name, summary)} "
        f"(95%, mean of the {over}, {summary['num_images']:,} images)"
    )


def table_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of terms: the headline first, then its parts, then what else is known, without the labels' means."""
    means, headline = summary["means"], summary["headline"]
    bound = headline.removeprefix("bits_per_dim.")
    untold = untold_name(bound)
    beside = (f"bits_per_dim.{untold}", f"label_tells.{untold}") if summary.get("labels") == "both" else ()
    first = [headline, *beside, "L_T", f"L_t_sum.{bound}", f"L_0.{bound}"]
    first += [f"{name}.clipped" for name in (headline, f"L_t_sum.{bound}", f"L_0.{bound}")]
    others = (name for name in means if name not in first and not name.startswith("by_label."))
    names = [*first, *sorted(others, key=_order)]
    rows = []
    for name in names:
        found = means[name]
        halves = {key: _half(found["mean"], found[key]) for key in ("given_images", "data_set", "population")}
        rows.append(
            {"label": label_of(name, summary), "mean": f"{found['mean']:.4f}", **halves, "main": name == headline}
        )
    return rows


def make_report(
    evaluation: Evaluation,
    request: EvaluateRequest,
    data: PreparedDataset,
    process: Process,
    notes: Sequence[str],
    provenance: Sequence[tuple[str, str]],
    title: str,
) -> Report:
    """Draw and write everything.

    Args:
        evaluation: The numbers.
        request: Of the evaluation.
        data: Its data set, for the pictures of the best and the worst images.
        process: The model's own, for its schedule.
        notes: How the numbers came about, a sentence each.
        provenance: (name, value): model, code, ...
        title: Of the page.
    """
    order = np.argsort(evaluation.bits_per_dim, kind="stable")
    count = min(_EXTREMES, max(1, len(order) // 2))
    files: dict[str, bytes] = {}
    best, worst = (data.read_rows(evaluation.ids[part])[0] for part in (order[:count], order[::-1][:count]))
    files["extremes.png"] = grid_png(np.concatenate([best, worst]), columns=count, min_side=900)
    curve, histogram, schedule = _draw_curve(evaluation), _draw_histogram(evaluation), _draw_schedule(process)
    files["by_t.png"], files["histogram.png"] = curve["png"], histogram["png"]
    picture = base64.b64encode(files["extremes.png"]).decode()
    values = evaluation.bits_per_dim[order]
    figures = [
        {"content": curve["svg"].decode(), "caption": _CURVES[evaluation.curve.t is None]},
        {"content": histogram["svg"].decode(), "caption": "Bits/dim of the images, and the means of the baselines."},
        {"content": schedule["svg"].decode(), "caption": _caption_of_schedule(process)},
        {
            "content": f'<img alt="images" src="data:image/png;base64,{picture}">',
            "caption": f"Above: the images with the fewest bits/dim ({values[0]:.2f} to {values[count - 1]:.2f}; ids "
            f"{_ids(evaluation, order[:count])}). Below: the most ({values[-1]:.2f} to {values[-count]:.2f}; ids "
            f"{_ids(evaluation, order[::-1][:count])}).",
        },
    ]
    class_figures = []
    if found := evaluation.summary.get("classification"):
        drawn = class_files(found, evaluation.summary["label_names"])
        files |= {name: content for name, content in drawn.items() if name.endswith(".png")}
        class_figures = [
            {"content": drawn["confusion.svg"].decode(), "caption": "Images of each class, by the class predicted."},
            {"content": drawn["calibration.svg"].decode(), "caption": "Accuracy of predictions, by their confidence."},
        ]
    labels = label_rows(evaluation.summary)
    if labels:
        files["by_label.csv"] = labels_csv(evaluation.summary)
    files["index.html"] = rendered(
        Path(__file__).with_name("report.html.j2"),
        title=title,
        headline=headline_of(evaluation.summary),
        model=request.model_id,
        data=f"{data.location} ({data.dataset_id[:12]})",
        rows=table_rows(evaluation.summary),
        summary=evaluation.summary,
        labels=labels,
        classification=classification_of(evaluation.summary) if class_figures else None,
        class_figures=class_figures,
        figures=figures,
        notes=notes,
        provenance=provenance,
    )
    return Report(files)


def _half(mean: float, interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[1] - mean:.4f}"


def _order(name: str) -> tuple[int, Any]:
    """Bounds of as many steps, bounds of fewer, the ODE, baselines."""
    what, *rest = (part for part in name.split(".") if part != "given_label")
    if what == "ode":
        return 2, rest[:1]
    if rest[0] in BASELINES:
        return 3, name
    steps = int(rest[0].removeprefix("steps_")) if rest[0].startswith("steps_") else 0
    return int(steps > 0), [steps, rest[-1]]


def _ids(evaluation: Evaluation, places: Any) -> str:
    return ", ".join(str(value) for value in evaluation.ids[places][:8]) + (", ..." if len(places) > 8 else "")


def _draw_curve(evaluation: Evaluation) -> dict[str, bytes]:
    figure, curve = new_figure(), evaluation.curve
    axes = figure.add_subplot()
    axes.plot(curve.log_snr if curve.t is None else curve.t, curve.kl, ".", markersize=3)
    axes.set_yscale("log" if (curve.kl > 0).all() else "symlog")
    if curve.t is None:
        axes.invert_xaxis()  # from the data to the noise, as over t
    axes.set_xlabel("t" if curve.t is not None else "log-SNR")
    variances = label_of(evaluation.summary["headline"], evaluation.summary).split(", ")[1]
    axes.set_ylabel(f"bits/dim, {variances}" if curve.t is not None else "bits/dim for each unit of log-SNR")
    return figure_files(figure)


def _draw_schedule(process: Process) -> dict[str, bytes]:
    figure = new_figure()
    axes = figure.add_subplot()
    if isinstance(process, DiscreteProcess):
        axes.plot(process.timesteps, process.log_snr)
        axes.set_ylabel("log-SNR")
    else:
        u = torch.linspace(0.0, 1.0, 257, dtype=torch.float64)
        axes.plot(u, continuous(process).gamma(u).detach())
        axes.plot([0.0, 1.0], continuous(process).ends, "--", linewidth=1, color="0.6")
        axes.set_ylabel("γ = -log-SNR")
    axes.set_xlabel("t")
    return figure_files(figure, ["svg"])


def _caption_of_schedule(process: Process) -> str:
    if isinstance(process, DiscreteProcess):
        return "log-SNR over t" + (", which ends at -∞." if process.prior_signal == 0.0 else ".")
    low, high = continuous(process).ends
    learned = isinstance(continuous(process).schedule, LearnedGamma)
    name, rest = ("The learned γ(t)", "; dashed: linear.") if learned else ("γ(t)", ", linear.")
    return f"{name} = -log-SNR from {low:.2f} to {high:.2f}{rest}"


def _draw_histogram(evaluation: Evaluation) -> dict[str, bytes]:
    figure = new_figure()
    axes = figure.add_subplot()
    axes.hist(evaluation.bits_per_dim, bins="auto", color="tab:blue", alpha=0.7)
    for color, (baseline, label) in zip(("tab:orange", "tab:green", "tab:red"), BASELINES.items(), strict=True):
        if found := evaluation.summary["means"].get(f"bits_per_dim.{baseline}"):
            mean = found["mean"]
            axes.axvline(mean, color=color, label=f"{label.split(' (')[0]}, {mean:.2f}")
    axes.set_xlabel("bits/dim")
    axes.set_ylabel("images")
    axes.legend(fontsize=7)
    return figure_files(figure)
