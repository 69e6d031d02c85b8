"""What is said and drawn of labels: the table by label, and the classification."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.evaluation.names import label_name
from pipelines.outputs.figures import figure_files, new_figure

# More names would run into each other, and more numbers into their cells.
_NAMES, _NUMBERS = 40, 16


def label_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each label's bits/dim: the headline's bound over the images that have it; none where it is not asked for.

    Of partly labelled data, evaluations of before have labels that are no whole numbers: those are left out.
    """
    of_labels = ((name.split(".")[1], each) for name, each in summary["means"].items() if name.startswith("by_label."))
    found = {label: each for label, each in of_labels if label.lstrip("-").isdigit()}
    return [
        {
            "label": label_name(label, summary).removeprefix("label "),
            "num_images": f"{found[label]['num_images']:,}",
            "mean": f"{found[label]['mean']:.4f}",
            "population": _half(found[label]),
        }
        for label in sorted(found, key=lambda label: (label == "-1", int(label)))
    ]


def labels_csv(summary: Mapping[str, Any]) -> bytes:
    """The same as a file that MLflow shows as a table."""
    sink = io.StringIO()
    rows = label_rows(summary)
    writer = csv.DictWriter(sink, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "num_images": row["num_images"].replace(",", "")} for row in rows)
    return sink.getvalue().encode()


def classification_of(summary: Mapping[str, Any]) -> str:
    """How good it is and what it took, in one line."""
    found = summary["classification"]
    each = found["evaluations"] / found["num_images"]
    effort = f"{each:,.0f} evaluations of the network per image"
    if saving(found) > 1.0:
        effort += f", {saving(found):.1f} times fewer than without giving classes up"
    if found["accuracy"] is None:
        return f"no image has one of the {len(found['classes'])} classes as its label; {effort}"
    accuracy, (low, high) = found["accuracy"], found["accuracy"]["interval"]
    return (
        f"accuracy {accuracy['mean']:.2%} (95%: {low:.2%} to {high:.2%}; {accuracy['num_images']:,} images of "
        f"{len(found['classes'])} classes), calibration error {found['ece']:.4f}; {effort}"
    )


def saving(found: Mapping[str, Any]) -> float:
    """How many times as many evaluations would have been made without giving classes up."""
    return float(found["evaluations_without_giving_up"] / found["evaluations"])


def class_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Of the classification, for MLflow; none without one."""
    if (found := summary.get("classification")) is None:
        return {}
    values = {"class/evaluations": found["evaluations"] / found["num_images"], "class/saving": saving(found)}
    if found["accuracy"] is None:
        return values
    low, high = found["accuracy"]["interval"]
    accuracy = {"class/accuracy": found["accuracy"]["mean"], "class/low": low, "class/high": high}
    return {**values, **accuracy, "class/calibration_error": found["ece"]}


def class_files(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, bytes]:
    """`confusion` and `calibration`, each as .svg and .png; `names` of all the model's classes."""
    drawn = {"confusion": _draw_confusion(found, names), "calibration": _draw_calibration(found)}
    return {f"{name}.{kind}": content for name, files in drawn.items() for kind, content in files.items()}


def _draw_confusion(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, bytes]:
    confusion = np.array(found["confusion"])
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure = new_figure()
    side = 3.4 if len(confusion) <= _NUMBERS // 2 else 5.2
    figure.set_size_inches(side + 1.0, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if len(confusion) <= _NAMES:
        shown = [names[label] if len(names[label]) <= 20 else f"{names[label][:19]}…" for label in found["classes"]]
        turned = {"rotation": 90} if max(map(len, shown)) > 2 else {}
        axes.set_xticks(range(len(shown)), shown, fontsize=7, **turned)
        axes.set_yticks(range(len(shown)), shown, fontsize=7)
    if len(confusion) <= _NUMBERS:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=7)
    return figure_files(figure)


def _draw_calibration(found: Mapping[str, Any]) -> dict[str, bytes]:
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], "--", linewidth=1, color="0.6")
    for bar in found["calibration"]:
        accuracy, (low, high) = bar["accuracy"]["mean"], bar["accuracy"]["interval"]
        axes.plot([bar["confidence"]] * 2, [low, high], color="tab:blue", linewidth=1)
        axes.plot(bar["confidence"], accuracy, "o", color="tab:blue", markersize=4)
        axes.annotate(
            str(bar["accuracy"]["num_images"]), (bar["confidence"], high), fontsize=7, ha="center", va="bottom"
        )
    axes.set_xlabel("confidence (posterior of the predicted class)")
    axes.set_ylabel("accuracy, with 95% interval")
    axes.set_xlim(0.0, 1.02)
    axes.set_ylim(0.0, 1.08)
    return figure_files(figure)


def _half(found: Mapping[str, Any]) -> str:
    return "–" if found["population"] is None else f"{found['population'][1] - found['mean']:.4f}"
