"""The evaluation's report: one HTML file without links to elsewhere, and the pictures for MLflow's page of the run."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.request import EvaluateRequest
from pipelines.evaluation.results import Evaluation
from pipelines.outputs.pictures import grid_png

_EXTREMES = 16
_BASELINES = {
    "bits_per_dim.png": "PNG file",
    "bits_per_dim.webp": "WebP file, lossless",
    "bits_per_dim.histogram": "independent pixels (histogram of the training images)",
}

_SIGMA2 = {"beta": "β", "beta_tilde": "β̃", "optimal": "optimal"}


@dataclass(frozen=True)
class Report:
    """Files by name: `index.html`, `by_t.png`, `histogram.png`, `extremes.png`."""

    files: dict[str, bytes]


def label_of(name: str) -> str:
    """What a person calls a number of `Evaluation.summary["means"]`.

    >>> label_of("bits_per_dim.beta_tilde.clipped")
    'bits/dim, σ² = β̃, x̂₀ clipped'
    >>> label_of("bits_per_dim.steps_50.beta_tilde")
    'bits/dim in 50 steps, σ² = β̃'
    """
    if name in _BASELINES:
        return f"bits/dim of {_BASELINES[name]}"
    what, *rest = name.split(".")
    label = {
        "bits_per_dim": "bits/dim",
        "L_T": "L_T",
        "L_0": "L_0",
        "L_t_sum": "sum of the L_{t-1}",
        "ode": "ODE",
        "by_label": "label",
    }[what]
    for part in rest:
        if part in _SIGMA2:
            label += f", σ² = {_SIGMA2[part]}"
        elif part.startswith("steps_"):
            label += f" in {part.removeprefix('steps_')} steps"
        else:
            label += {"clipped": ", x̂₀ clipped", "bits_per_dim": " bits/dim"}.get(part, f" {part.replace('_', ' ')}")
    return label


def headline_of(summary: Mapping[str, Any]) -> str:
    """The number that matters, with its interval, in one line."""
    found, name = summary["means"][summary["headline"]], summary["headline"]
    interval = found["data_set"] or found["population"]
    over = "data set" if found["data_set"] else "population"
    return (
        f"{found['mean']:.4f} ± {_half(found['mean'], interval)} {label_of(name)} "
        f"(95%, mean of the {over}, {summary['num_images']:,} images)"
    )


def table_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of terms: the headline first, then its parts, then what else is known."""
    means, headline = summary["means"], summary["headline"]
    sigma2 = headline.removeprefix("bits_per_dim.")
    first = [headline, "L_T", f"L_t_sum.{sigma2}", f"L_0.{sigma2}"]
    first += [f"{name}.clipped" for name in (headline, f"L_t_sum.{sigma2}", f"L_0.{sigma2}")]
    names = [*first, *sorted((name for name in means if name not in first), key=_order)]
    rows = []
    for name in names:
        found = means[name]
        halves = {key: _half(found["mean"], found[key]) for key in ("given_images", "data_set", "population")}
        rows.append({"label": label_of(name), "mean": f"{found['mean']:.4f}", **halves, "main": name == headline})
    return rows


def make_report(
    evaluation: Evaluation,
    request: EvaluateRequest,
    data: PreparedDataset,
    notes: Sequence[str],
    provenance: Sequence[tuple[str, str]],
    title: str,
) -> Report:
    """Draw and write everything.

    Args:
        evaluation: The numbers.
        request: Of the evaluation.
        data: Its data set, for the pictures of the best and the worst images.
        notes: How the numbers came about, a sentence each.
        provenance: (name, value): model, code, ...
        title: Of the page.
    """
    order = np.argsort(evaluation.bits_per_dim, kind="stable")
    count = min(_EXTREMES, max(1, len(order) // 2))
    files: dict[str, bytes] = {}
    best, worst = (data.read_rows(evaluation.ids[part])[0] for part in (order[:count], order[::-1][:count]))
    files["extremes.png"] = grid_png(np.concatenate([best, worst]), columns=count, min_side=900)
    curve, histogram = _draw_by_t(evaluation, request.sigma2), _draw_histogram(evaluation)
    files["by_t.png"], files["histogram.png"] = curve["png"], histogram["png"]
    picture = base64.b64encode(files["extremes.png"]).decode()
    values = evaluation.bits_per_dim[order]
    figures = [
        {"content": curve["svg"].decode(), "caption": "Mean term at each t: L_0 at t = 0, the KL above it."},
        {"content": histogram["svg"].decode(), "caption": "Bits/dim of the images, and the means of the baselines."},
        {
            "content": f'<img alt="images" src="data:image/png;base64,{picture}">',
            "caption": f"Above: the images with the fewest bits/dim ({values[0]:.2f} to {values[count - 1]:.2f}; ids "
            f"{_ids(evaluation, order[:count])}). Below: the most ({values[-1]:.2f} to {values[-count]:.2f}; ids "
            f"{_ids(evaluation, order[::-1][:count])}).",
        },
    ]
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("report.html.j2").read_text()
    )
    page = template.render(
        title=title,
        headline=headline_of(evaluation.summary),
        model=request.model_id,
        data=f"{data.location} ({data.dataset_id[:12]})",
        rows=table_rows(evaluation.summary),
        summary=evaluation.summary,
        figures=figures,
        notes=notes,
        provenance=provenance,
    )
    files["index.html"] = page.encode()
    return Report(files)


def _half(mean: float, interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[1] - mean:.4f}"


def _order(name: str) -> tuple[int, Any]:
    kinds = ("bits_per_dim.beta", "bits_per_dim.optimal", "bits_per_dim.steps", "ode", "bits_per_dim", "by_label")
    kind = next(index for index, start in enumerate(kinds) if name.startswith(start))
    return kind, [int(part) if part.isdigit() else part for part in name.replace("_", ".").split(".")][2:3] or name


def _ids(evaluation: Evaluation, places: Any) -> str:
    return ", ".join(str(value) for value in evaluation.ids[places][:8]) + (", ..." if len(places) > 8 else "")


def _draw_by_t(evaluation: Evaluation, sigma2: str) -> dict[str, bytes]:
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot(evaluation.t, evaluation.kl_by_t, ".", markersize=3)
    axes.set_yscale("log" if (evaluation.kl_by_t > 0).all() else "symlog")
    axes.set_xlabel("t")
    axes.set_ylabel(f"bits/dim, {label_of(f'L_0.{sigma2}').split(', ')[1]}")
    return _files(figure)


def _draw_histogram(evaluation: Evaluation) -> dict[str, bytes]:
    figure = _figure()
    axes = figure.add_subplot()
    axes.hist(evaluation.bits_per_dim, bins="auto", color="tab:blue", alpha=0.7)
    for color, (name, label) in zip(("tab:orange", "tab:green", "tab:red"), _BASELINES.items(), strict=True):
        if name in evaluation.summary["means"]:
            mean = evaluation.summary["means"][name]["mean"]
            axes.axvline(mean, color=color, label=f"{label.split(' (')[0]}, {mean:.2f}")
    axes.set_xlabel("bits/dim")
    axes.set_ylabel("images")
    axes.legend(fontsize=7)
    return _files(figure)


def _figure() -> Any:
    from matplotlib.figure import Figure  # half a second, and only at the end of a job

    return Figure(figsize=(5.2, 3.4), layout="constrained")


def _files(figure: Any) -> dict[str, bytes]:
    import matplotlib

    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "ddpm", "svg.fonttype": "none"}):
        for kind in ("svg", "png"):
            sink = io.BytesIO()
            figure.savefig(sink, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
            files[kind] = sink.getvalue()
    files["svg"] = files["svg"][files["svg"].index(b"<svg") :]
    return files
