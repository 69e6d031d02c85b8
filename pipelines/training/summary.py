"""The closing summary of a training."""

from dataclasses import dataclass
from typing import Any

from pipelines.cli.console import clock, plus_minus
from pipelines.tracking.tracker import TrackingReport
from pipelines.training.config import TrainJob
from pipelines.training.tracked import baselines_line, registered_name, rows_in_words
from pipelines.training.words import bound_in_words, quality_in_words, trained_as


@dataclass(frozen=True)
class TrainSummary:
    """What a finished training left: `rows` are (name, value) pairs for the closing summary."""

    title: str
    rows: list[tuple[str, str]]


def summarise(
    job: TrainJob, result: dict[str, Any], report: TrackingReport, seconds: float | None, rate: float | None
) -> TrainSummary:
    """The summary of a training that has done all its steps.

    Args:
        job: The training.
        result: What its workers left.
        report: What became of its records.
        seconds: That this attempt took; None where all steps had been done before.
        rate: Images per second while training; None where it was too short to say.
    """
    rows = []
    if scores := result["validation"]:
        bound = bound_in_words(scores["sigma2"], job.config.diffusion.table_length)
        rows.append(
            (
                "bits/dim",
                f"{plus_minus(scores['total'], scores['standard_error'])} (standard error; ELBO of "
                f"{scores['num_images']} validation images; {bound})",
            )
        )
        if baselines := scores.get("baselines"):
            rows.append(("baselines", f"{baselines_line(baselines)} (the same images without a model)"))
        rows.append(("terms", f"L_T {scores['prior']:.5f} + {_between(scores)} + L_0 {scores['decoder']:.4f}"))
    if quality := result.get("quality"):
        rows.append(("quality", quality_in_words(quality)))
    if used := result.get("rows"):
        rows.append(("ledger", rows_in_words(used)))
    rows += [
        ("objective", trained_as(job, result["step"])),
        ("model", f"{result['model']} ({result['parameters']:,} parameters, id {result['model_id'][:12]})"),
        ("samples", result["grid"]),
        ("MLflow", report.link or "not reached"),
    ]
    if report.champion:
        rows.append(("champion", f"{report.champion} (models:/{registered_name(job)}@champion)"))
    if report.advice:
        rows.append(("tracking", report.advice))
    name = job.config.name
    if seconds is None:
        rows.append(("note", f"was finished already; train on with a larger --train.steps than {result['step']:,}"))
        return TrainSummary(f"{name}: nothing to do", rows)
    training = f", {rate:,.0f} images/s while training" if rate else ""
    rows.append(("time", f"{clock(seconds)} in this attempt{training}"))
    return TrainSummary(f"{name}: trained {result['step']:,} steps", rows)


def _between(scores: dict[str, Any]) -> str:
    return f"diffusion {scores['diffusion']:.4f}" if "diffusion" in scores else f"ΣL_t {scores['kl_sum']:.4f}"
