"""Every number of a pair of sets against the values of independent implementations."""

import numpy as np
import pytest
from support.manifolds import manifolds

from ddpm_core.sets.distances import frechet_distance, kernel_distance
from ddpm_core.sets.moments import Moments


@pytest.fixture(scope="module")
def golden(modern_reference):
    return modern_reference["set_metrics"]


@pytest.fixture(scope="module")
def sets(golden):
    return np.array(golden["real"]), np.array(golden["fake"])


def test_the_frechet_distance_dowson_and_landau_1982(golden, sets):
    assert frechet_distance(*map(Moments.of, sets)) == pytest.approx(golden["fd"], rel=1e-9)


def test_the_kernel_distance_binkowski_2018(golden, sets):
    assert kernel_distance(*sets) == pytest.approx(golden["kid"], rel=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_manifolds_kynkaanniemi_2019_and_naeem_2020(golden, sets, k):
    found = manifolds(*(features.astype(np.float32) for features in sets), k, num_groups=4)
    for name, value in golden[f"k{k}"].items():
        assert getattr(found, name).value == pytest.approx(value, rel=1e-9), name
