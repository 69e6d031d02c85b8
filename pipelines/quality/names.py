"""What the numbers of a comparison are called: by a person, and in MLflow."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.quality.request import QualityRequest


@dataclass(frozen=True)
class Number:
    """A number of a comparison: its title, which way is better, and what it says."""

    title: str
    lower_is_better: bool
    meaning: str


NUMBERS = {
    "fd": Number(
        "Fréchet distance",
        True,
        "Between Gaussians of the two sides' means and covariances; too large by a share that falls as one over the "
        "number of images. The interval is for the mean of sets of these sizes.",
    ),
    "fd_limit": Number(
        "Fréchet distance, n → ∞",
        True,
        "The same, extrapolated over one over the number of images (Chong & Forsyth 2020). The interval is for the "
        "distance between what the images are drawn from.",
    ),
    "kid": Number(
        "kernel distance (KID)",
        True,
        "Squared maximum mean discrepancy of a cubic kernel, unbiased (Bińkowski 2018); may fall below 0. The interval "
        "is over independent blocks.",
    ),
    "precision": Number("precision", False, "Share of samples that lie in the reference's balls (Kynkäänniemi 2019)."),
    "recall": Number("recall", False, "Share of reference images that lie in the samples' balls."),
    "density": Number("density", False, "Reference balls around a sample, over k (Naeem 2020)."),
    "coverage": Number("coverage", False, "Share of reference images whose ball holds a sample (Naeem 2020)."),
}


def title_of(name: str, request: QualityRequest) -> str:
    """What a person calls a number: the Fréchet distance is called FID only where it is it."""
    title = NUMBERS[name].title
    return title.replace("Fréchet distance", "FID") if request.extractor.is_fid else title


def metric_of(name: str, request: QualityRequest, label: int | None = None, label_name: str | None = None) -> str:
    """The metric in MLflow: what it is, of which features, and the stamp of how it was measured, so that a curve or a
    chart never holds numbers that are not comparable."""
    what = name
    if label is not None:
        word = "" if label_name is None else re.sub(r"[^\w .-]", "_", f"_{label_name}")
        what = f"{name}_label/{label}{word}"
    return f"{what}{'/' if label is None else '.'}{_measured_by(request)}"


def interval_metrics(name: str, request: QualityRequest) -> tuple[str, str]:
    """The metrics that are the ends of a number's interval."""
    return f"low/{name}.{_measured_by(request)}", f"high/{name}.{_measured_by(request)}"


def _measured_by(request: QualityRequest) -> str:
    return f"{request.extractor.name}.{request.stamp}"


def in_short(found: Mapping[str, float]) -> str:
    """A number with its 95% interval, for a table of many columns.

    >>> in_short({"value": 12.3456, "low": 11.9, "high": 12.81})
    '12.35 (11.90 to 12.81)'
    """
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
