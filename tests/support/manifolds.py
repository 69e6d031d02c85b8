"""Precision, recall, density and coverage of two sets, by the steps of the quality job."""

import numpy as np
import numpy.typing as npt

from ddpm_core.sets.manifolds import (
    Manifolds,
    ManifoldSums,
    distances_without,
    list_length,
    neighbour_groups,
    radii,
)
from ddpm_core.sets.neighbours import Neighbours

Float32s = npt.NDArray[np.float32]


def manifolds(reference: Float32s, samples: Float32s, k: int, num_groups: int) -> Manifolds:
    """Of features float32 [n, d] and [m, d], with groups dealt in turn."""
    reference_ids, sample_ids = np.arange(len(reference)), np.arange(len(samples))
    reference_groups, sample_groups = reference_ids % num_groups, sample_ids % num_groups
    balls = []
    for features, ids, groups in (
        (reference, reference_ids, reference_groups),
        (samples, sample_ids, sample_groups),
    ):
        own = Neighbours(features, k, ids)
        own.add(ids, features)
        balls.append(radii(own.distances, groups, k, num_groups))
    of_samples = Neighbours(samples, 0, num_radii=1 + num_groups)
    of_samples.add(reference_ids, reference, balls[0])
    of_reference = Neighbours(reference, list_length(1, num_groups), num_radii=1 + num_groups)
    of_reference.add(sample_ids, samples, balls[1])
    nearest = distances_without(
        of_reference.distances, neighbour_groups(of_reference.ids, sample_groups), 1, num_groups
    )
    sums = ManifoldSums.of_samples(of_samples.inside)
    sums += ManifoldSums.of_references(of_reference.inside, nearest, balls[0])
    return sums.estimates(k)
