"""The report of a comparison: one HTML file without links to elsewhere, and its pictures for MLflow's page of it."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.cli.console import with_interval
from pipelines.data.dataset import UInt8s
from pipelines.outputs.figures import figure_files, new_figure
from pipelines.outputs.pictures import grid_png
from pipelines.outputs.report import rendered
from pipelines.quality.features import described
from pipelines.quality.image_set import ImageSet
from pipelines.quality.inputs import Inputs
from pipelines.quality.names import NUMBERS, in_short, title_of
from pipelines.quality.publish import headline_of, in_percent
from pipelines.quality.request import QualityRequest
from pipelines.quality.resize import resize
from pipelines.quality.searches import NEIGHBOURS, Search, lists_of, searches
from pipelines.storage.location import Location

_SHOWN, _LARGEST = 16, 128


def make_report(
    location: Location, request: QualityRequest, inputs: Inputs, measured: Mapping[str, Any], title: str
) -> dict[str, bytes]:
    """Files by name: `index.html`, `images.png`; `fd_by_size.png` where there is a Fréchet distance; of memorisation
    `closest_SPACE.png` and `distances_SPACE.png`."""
    sets = inputs.sets
    files: dict[str, bytes] = {"images.png": _first_images(sets["samples"], sets["reference"])}
    captions = {"images.png": "The first samples above, the first reference images below."}
    if measured["all"]["fd_by_size"]:
        files["fd_by_size.png"] = _draw_sizes(measured["all"])
        captions["fd_by_size.png"] = (
            "The Fréchet distance of fewer images, over one over their number: its bias. The cross is the limit for "
            "many images, with its interval."
        )
    for space, found in measured.get("memorisation", {}).items():
        files[f"closest_{space}.png"] = _closest(inputs, found["pairs"])
        captions[f"closest_{space}.png"] = (
            f"The samples closest to a training image in {space} above, those images below; ids "
            + ", ".join(f"{pair['sample']} and {pair['train']} ({pair['distance']:.3g})" for pair in found["pairs"][:4])
            + ", ..."
        )
        files[f"distances_{space}.png"] = _draw_distances(location, request, space, found)
        captions[f"distances_{space}.png"] = f"Distance to the nearest training image in {space}."
    figures = [
        {
            "content": f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(files[name]).decode()}">',
            "caption": caption,
        }
        for name, caption in captions.items()
    ]
    page = rendered(
        Path(__file__).with_name("report.html.j2"),
        title=title,
        headline=headline_of(request, measured),
        subtitle=f"{sets['samples'].location} against {sets['reference'].location}",
        rows=_rows(measured["all"], request),
        left_out=sorted(set(measured["all"]["left_out"].values())),
        columns=[title_of(name, request) for name in NUMBERS],
        left_out_of_classes=sorted({why for of in measured["classes"].values() for why in of["left_out"].values()}),
        classes=[_class_row(inputs, label, found) for label, found in measured["classes"].items()],
        memorised=[_memory_row(space, found) for space, found in measured.get("memorisation", {}).items()],
        duplicates=measured["duplicates"],
        figures=figures,
        notes=[f"{title_of(name, request)}: {number.meaning}" for name, number in NUMBERS.items()],
        provenance=_provenance(request, inputs),
    )
    return {**files, "index.html": page}


def _rows(found: Mapping[str, Any], request: QualityRequest) -> list[dict[str, str]]:
    return [
        {
            "title": title_of(name, request),
            "value": with_interval(found["numbers"][name]),
            "better": "lower" if NUMBERS[name].lower_is_better else "higher",
        }
        for name in NUMBERS
        if name in found["numbers"]
    ]


def _class_row(inputs: Inputs, label: str, found: Mapping[str, Any]) -> dict[str, Any]:
    names = inputs.label_names
    return {
        "name": names[int(label)] if int(label) < len(names) else label,
        "sizes": f"{found['num_samples']:,} / {found['num_reference']:,}",
        "values": [in_short(found["numbers"][name]) if name in found["numbers"] else "–" for name in NUMBERS],
    }


def _memory_row(space: str, found: Mapping[str, Any]) -> dict[str, Any]:
    shares = [in_short(found["closer"]), *(in_percent(found[name]) for name in ("near", "near_by_ratio"))]
    return {"space": space, "shares": shares, "alarm": found["alarm"]}


def _provenance(request: QualityRequest, inputs: Inputs) -> list[tuple[str, str]]:
    sets, model = inputs.sets, inputs.model
    return [
        *(
            (role, f"{images.location} (id {images.dataset_id}, {images.num_rows:,} images)")
            for role, images in sets.items()
        ),
        *([("sampler", inputs.sampler)] if inputs.sampler else []),
        *([("evaluations per sample", f"{inputs.evaluations:,}")] if inputs.evaluations else []),
        ("features", described(request.extractor)),
        ("protocol", ", ".join(f"{name} {value}" for name, value in request.protocol.items() if name != "extractor")),
        ("stamp", request.stamp),
        *([("model", f"{model.found.uri} (id {model.found.model_id}, step {model.step})")] if model else []),
    ]


def _read(images: ImageSet, ids: Sequence[int]) -> UInt8s:
    """The images of any ids, in their order, uint8 [n, H, W, C]."""
    return np.concatenate([images.read_images(row, row + 1)[1] for row in ids])


def _first_images(samples: ImageSet, reference: ImageSet) -> bytes:
    count = min(_SHOWN, samples.num_rows, reference.num_rows)
    above, below = (images.read_images(0, count)[1] for images in (samples, reference))
    return _rows_png(above, below)


def _closest(inputs: Inputs, pairs: Sequence[Mapping[str, Any]]) -> bytes:
    above = _read(inputs.sets["samples"], [pair["sample"] for pair in pairs])
    below = _read(inputs.sets["train"], [pair["train"] for pair in pairs])
    return _rows_png(above, below)


def _rows_png(above: UInt8s, below: UInt8s) -> bytes:
    """Two rows of images, those of more than 128 pixels reduced."""
    height, width = above.shape[1:3]
    scale = min(1.0, _LARGEST / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return grid_png(np.concatenate([resize(above, size), resize(below, size)]), columns=len(above), min_side=900)


def _draw_sizes(found: Mapping[str, Any]) -> bytes:
    figure = new_figure()
    axes = figure.add_subplot()
    sizes, distances = zip(*found["fd_by_size"], strict=True)
    axes.plot([1 / size for size in sizes], distances, "o-", markersize=4)
    limit = found["numbers"]["fd_limit"]
    error = [[limit["value"] - limit["low"]], [limit["high"] - limit["value"]]]
    axes.errorbar([0.0], [limit["value"]], yerr=error, fmt="x", color="tab:red", capsize=3)
    axes.set_xlabel("1 / images of each side")
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylabel("Fréchet distance")
    top, bottom = max(limit["high"], *distances), min(0.0, limit["low"])
    axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
    return figure_files(figure)["png"]


def _draw_distances(location: Location, request: QualityRequest, space: str, found: Mapping[str, Any]) -> bytes:
    figure = new_figure()
    axes = figure.add_subplot()
    wanted = [each for each in searches(request, NEIGHBOURS) if each.base == "train" and each.space == space]
    distances = {_called(each): lists_of(location, request, each).distances[:, 0] for each in wanted}
    bins = np.linspace(0.0, float(np.quantile(np.concatenate(list(distances.values())), 0.99)), 60)
    for name, values in distances.items():
        axes.hist(values, bins=bins, density=True, histtype="step", label=name)
    axes.axvline(found["threshold"], color="0.6", linewidth=1, label="1% of unseen images are closer")
    axes.set_xlabel(f"distance in {space}")
    axes.set_yticks([])
    axes.legend(fontsize=7)
    return figure_files(figure)["png"]


def _called(search: Search) -> str:
    return {"samples": "samples", "unseen": "unseen images"}[search.queries]
