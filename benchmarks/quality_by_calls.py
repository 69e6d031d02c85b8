"""What quality costs: the distance of sample sets from a reference against the evaluations that each image took.

    uv run benchmarks/quality_by_calls.py OUTPUT OUTPUT ... --figure quality_by_calls.png

Reads finished outputs of jobs/quality.py of one protocol, whose samples are sample sets; prints a table and draws it.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from ddpm_core.kind import kind_of
from ddpm_core.model import model_from_bytes
from pipelines.cli.console import with_interval
from pipelines.models.kept import stored_model
from pipelines.outputs.manifest import read_manifest
from pipelines.sampling.sample_set import SampleSet
from pipelines.storage.location import Location

COLUMNS = {"fd": "Fréchet distance", "fd_limit": "n → ∞", "kid": "KID", "precision": "precision", "recall": "recall"}


class Row(NamedTuple):
    """One comparison."""

    model: str
    sampler: str
    evaluations: int
    numbers: dict[str, dict[str, float]]
    protocol: dict[str, Any]


def row_of(output: str) -> Row:
    """What a comparison found, of samples that say how they were made."""
    manifest = read_manifest(Location.parse(output))
    samples = SampleSet.open(Location.parse(manifest["sets"]["samples"]))
    found = stored_model(samples.location / "model")
    assert found is not None
    model = kind_of(model_from_bytes(found.files).config)
    assert samples.evaluations is not None, f"{samples.location}: made before its manifest said so; make it again"
    numbers = manifest["results"]["all"]["numbers"]
    return Row(model, samples.made_by, samples.evaluations, numbers, manifest["protocol"])


def draw(rows: list[Row], path: Path) -> None:
    """Distance over evaluations, with intervals; a panel for each model."""
    models = sorted({row.model for row in rows})
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.2 * len(models), 3.6), sharex=True, sharey=True, squeeze=False
    )
    names = sorted({row.sampler.split(",")[0].split(" ")[0] for row in rows})
    for axes, model in zip(panels[0], models, strict=True):
        for number, name in enumerate(names):
            points = sorted(
                (row.evaluations, *(row.numbers["fd"][end] for end in ("value", "low", "high")))
                for row in rows
                if row.model == model and row.sampler.split(",")[0].split(" ")[0] == name
            )
            if points:
                calls, values, lows, highs = zip(*points, strict=True)
                ends = [[v - low for v, low in zip(values, lows, strict=True)]]
                ends.append([high - v for v, high in zip(values, highs, strict=True)])
                axes.errorbar(calls, values, ends, fmt="o-", markersize=4, capsize=2, label=name, color=f"C{number}")
        axes.set_title(model.replace(", ", "\n", 1), fontsize=9)
        axes.set(xlabel="evaluations of the network for each image", xscale="log", yscale="log")
        calls_made = sorted({row.evaluations for row in rows})
        axes.set_xticks(calls_made, [str(each) for each in calls_made], minor=False)
        axes.set_xticks([], minor=True)
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:g}")
    panels[0][0].set_ylabel("Fréchet distance (random_conv_64)")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="+")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    rows = sorted(map(row_of, args.outputs), key=lambda row: (row.model, row.evaluations, row.sampler))
    assert len({row.protocol["stamp"] for row in rows}) == 1, "these were measured in different ways"
    print("| Model | Sampler | Evaluations | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (3 + len(COLUMNS)) + "|")
    for row in rows:
        values = " | ".join(with_interval(row.numbers[name]) for name in COLUMNS)
        print(f"| {row.model} | {row.sampler} | {row.evaluations} | {values} |")
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
