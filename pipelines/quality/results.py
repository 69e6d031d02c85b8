"""Every number of a comparison, from the stored features and neighbours: made when they are there, and by verify."""

from dataclasses import asdict
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from ddpm_core.sets import NUM_GROUPS, fewest_images
from ddpm_core.sets.distances import frechet_distance, frechet_estimates, kernel_estimate, kernel_rows
from ddpm_core.sets.jackknife import Estimate
from ddpm_core.sets.manifolds import ManifoldSums, distances_without
from ddpm_core.sets.memorisation import NEAR_QUANTILE, alarm, closer, near, nearest_ratios
from ddpm_core.sets.moments import Moments
from pipelines.quality.extractors.request import Float32s
from pipelines.quality.request import MOST_FEATURES, QualityRequest, Role, Space, has_covariance
from pipelines.quality.searches import Found, Sides, found_by, group_of_ids, lists_of, radii_in, search_of
from pipelines.storage.location import Location

_PARTS = (10, 5, 3, 2, 1)
"""Into how many parts the groups are dealt for the figure of the Fréchet distance over the number of images."""
CLOSEST = 16
"""Pairs of a sample and a training image that the report shows."""


def results(location: Location, request: QualityRequest, sides: Sides) -> dict[str, Any]:
    """All numbers as JSON values.

    `all` and each of `classes` have, by name, value, standard_error, low and high (95%) of what
    `pipelines.quality.names.NUMBERS` explains; `left_out` says which are missing and why. `memorisation` is by space.
    """
    summary: dict[str, Any] = {"all": _compared(location, request, sides, None)}
    summary["classes"] = {str(each.label): _compared(location, request, sides, each.label) for each in request.classes}
    summary["duplicates"] = _duplicates(location, request, sides)
    if request.train is not None:
        summary["memorisation"] = {space: _memorisation(location, request, sides, space) for space in request.spaces}
    return summary


def _compared(location: Location, request: QualityRequest, sides: Sides, label: int | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    sizes = {role: len(sides.rows(role, label)) for role in ("samples", "reference")}
    dimensions = request.extractor.num_features
    by_size: list[tuple[int, float]] = []
    if has_covariance(dimensions, min(sizes.values())):
        moments = [_moments(sides, role, label, dimensions) for role in ("samples", "reference")]
        numbers["fd"], numbers["fd_limit"] = frechet_estimates(*moments)
        if label is None:
            by_size = _by_size(*moments)
    else:
        rule = (
            f"needs {fewest_images(dimensions):,} images of each side for {dimensions:,} features, there are "
            f"{min(sizes.values()):,}"
            if dimensions <= MOST_FEATURES
            else f"takes at most {MOST_FEATURES:,} features, there are {dimensions:,}"
        )
        left_out = {"fd": rule, "fd_limit": rule}
    numbers["kid"] = _kernel_distance(sides, label)
    numbers |= _manifolds(location, request, sides, label)
    return {
        **{f"num_{role}": size for role, size in sizes.items()},
        "numbers": {name: asdict(found) for name, found in numbers.items()},
        "left_out": left_out,
        "fd_by_size": by_size,
    }


def _moments(sides: Sides, role: Role, label: int | None, dimensions: int) -> list[Moments]:
    """Of each group, merged shard by shard in the order of ids, whoever has computed the shards."""
    groups, moments, done = sides.groups(role, label), [Moments.empty(dimensions)] * NUM_GROUPS, 0
    for block in sides.read(role, "features", sides.rows(role, label)):
        of_rows = groups[done : done + len(block.ids)]
        done += len(block.ids)
        for group in range(NUM_GROUPS):
            chosen = block.features[of_rows == group]
            if len(chosen):
                moments[group] = moments[group].merged(Moments.of(chosen))
    return moments


def _by_size(samples: list[Moments], reference: list[Moments]) -> list[tuple[int, float]]:
    """(images of the smaller side, mean Fréchet distance) where the groups are dealt into equal parts."""
    found = []
    for count in _PARTS:
        pairs = [[reduce(Moments.merged, side[part::count]) for side in (samples, reference)] for part in range(count)]
        if min(side.count for pair in pairs for side in pair) > len(samples[0].mean):
            sizes = [min(side.count for side in pair) for pair in pairs]
            found.append((round(np.mean(sizes)), float(np.mean([frechet_distance(*pair) for pair in pairs]))))
    return found


def _kernel_distance(sides: Sides, label: int | None) -> Estimate:
    """Of the features of at most 50,000 images of each side, which the driver holds."""

    def features(role: Role) -> Float32s:
        rows = sides.rows(role, label)
        chosen = rows[kernel_rows(len(rows), f"quality/{role}/blocks")]
        return np.concatenate([block.features for block in sides.read(role, "features", chosen)])

    streams = "quality/samples/blocks", "quality/reference/blocks"
    return kernel_estimate(features("samples"), features("reference"), *streams)


def _manifolds(location: Location, request: QualityRequest, sides: Sides, label: int | None) -> dict[str, Estimate]:
    """Precision, recall, density and coverage."""
    sums = ManifoldSums.empty(NUM_GROUPS)
    for found in found_by(location, request, search_of(request, "samples", "reference", label)):
        assert found.inside is not None, "balls are counted between the sides"
        sums += ManifoldSums.of_samples(found.inside)
    own_radii, done = radii_in(location, request, sides, "reference", label), 0
    for found in found_by(location, request, search_of(request, "reference", "samples", label)):
        assert found.inside is not None, "balls are counted between the sides"
        of_rows = own_radii[done : done + len(found.ids)]
        sums += ManifoldSums.of_references(found.inside, _nearest(found, sides, "samples", label), of_rows)
        done += len(found.ids)
    return vars(sums.estimates(request.neighbours))


def _nearest(found: Found, sides: Sides, base: Role, label: int | None) -> npt.NDArray[np.float64]:
    """Distances to the nearest of the base, of all and without each of its groups: float64 [n, 1 + groups]."""
    of_neighbours = group_of_ids(found.neighbours, sides.rows(base, label), sides.groups(base, label))
    return distances_without(found.distances, of_neighbours, 1, NUM_GROUPS)


def _duplicates(location: Location, request: QualityRequest, sides: Sides) -> dict[str, int]:
    """Samples that are the same picture as an earlier one, by the digest of their pixels; and those that another one is
    at distance 0 of, in the features."""
    digests = sides.sets["samples", "features"].read_digests()[sides.rows("samples")]
    own = lists_of(location, request, search_of(request, "samples", "samples", None))
    return {
        "by_digest": int(len(digests) - len(np.unique(digests))),
        "by_distance": int((own.distances[:, 0] == 0.0).sum()),
    }


def _memorisation(location: Location, request: QualityRequest, sides: Sides, space: Space) -> dict[str, Any]:
    """Whether samples are closer to training images than unseen images are, and the closest pairs."""
    samples, unseen = (
        lists_of(location, request, search_of(request, role, "train", None, space)) for role in ("samples", "unseen")
    )
    nearest = samples.distances[:, 0], unseen.distances[:, 0]
    near_samples, copies = near(*nearest), near(nearest_ratios(samples.distances), nearest_ratios(unseen.distances))
    order = np.argsort(samples.distances[:, 0], kind="stable")[:CLOSEST]
    return {
        "closer": asdict(closer(*nearest)),
        "near": asdict(near_samples),
        "near_by_ratio": asdict(copies),
        "threshold": float(np.quantile(unseen.distances[:, 0], NEAR_QUANTILE, method="weibull")),
        "alarm": alarm(near_samples) or alarm(copies),
        "pairs": [
            {
                "sample": int(samples.ids[row]),
                "train": int(samples.neighbours[row, 0]),
                "distance": float(samples.distances[row, 0]),
            }
            for row in order
        ],
    }
