"""Exact neighbours: equal to all distances in float64, bit for bit, in whatever blocks and order the base comes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.errors import ConfigError
from ddpm_core.sets.neighbours import Neighbours, exact_distances


def all_distances(queries: np.ndarray, base: np.ndarray) -> np.ndarray:
    return np.stack([exact_distances(np.broadcast_to(query, base.shape), base) for query in queries])


def expected(queries, base, ids, k, own_ids, radii):
    distances = all_distances(queries, base)
    others = np.ones(distances.shape, bool) if own_ids is None else ids != own_ids[:, None]
    inside = ((distances[:, :, None] <= radii) & others[:, :, None]).sum(1)
    distances = np.where(others, distances, np.inf)
    order = np.lexsort((np.broadcast_to(ids, distances.shape), distances), axis=-1)[:, :k]
    nearest = np.pad(np.take_along_axis(distances, order, 1), ((0, 0), (0, k - order.shape[1])), constant_values=np.inf)
    found = np.pad(ids[order], ((0, 0), (0, k - order.shape[1])), constant_values=-1)
    return nearest, np.where(np.isinf(nearest), -1, found), inside


def check(queries, base, ids, k, own_ids, radii, blocks):
    found = Neighbours(queries, k, own_ids, radii.shape[1])
    for block in blocks:
        found.add(ids[block], base[block], radii[block])
    distances, neighbours, inside = expected(queries, base, ids, k, own_ids, radii)
    assert (found.distances == distances).all()
    assert (found.ids == neighbours).all()
    assert (found.inside == inside).all()


SCALES = {"plain": (1.0, 0.0), "far": (1.0, 1e6), "tiny": (1e-22, 0.0), "huge": (1e30, 0.0), "constant": (0.0, 3.0)}


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(0, 5),
    st.integers(1, 9),
    st.sampled_from(sorted(SCALES)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_blocks_order_duplicates_and_offsets_do_not_matter(rows, k, d, scale, coarse, within, seed):
    rng = np.random.default_rng(seed)
    spread, offset = SCALES[scale]
    base = rng.standard_normal((rows, d))
    base = ((base.round() if coarse else base) * spread + offset).astype(np.float32)  # coarse: with ties and duplicates
    ids = rng.permutation(10 * rows)[:rows]
    queries, own_ids = (base, ids) if within else (base[::2] + np.float32(spread / 4), None)
    typical = all_distances(queries, base).ravel()
    radii = rng.choice(typical, (rows, 2)) * rng.choice([-1.0, 1.0], (rows, 2))
    blocks = np.array_split(rng.permutation(rows), rng.integers(1, 5))
    check(queries, base, ids, k, own_ids, radii, blocks)


@pytest.mark.parametrize("d", [2, 33])
def test_many_tiles(monkeypatch, d):
    monkeypatch.setattr("ddpm_core.sets.neighbours._QUERIES", 32)
    monkeypatch.setattr("ddpm_core.sets.neighbours._BASE", 16)
    monkeypatch.setattr("ddpm_core.sets.neighbours._BLOCK", 64)
    rng = np.random.default_rng(d)
    base = rng.standard_normal((500, d)).astype(np.float32)
    base[100:150] = base[:50]
    ids = np.arange(500)
    radii = np.quantile(all_distances(base[:50], base), 0.02) * rng.random((500, 3))
    check(base, base, ids, 4, ids, radii, np.array_split(ids, 7))


def test_a_row_just_outside_what_float32_can_tell_is_outside():
    """Distances that differ by less than float32 resolves decide correctly."""
    base = np.array([[1.0, 0.0], [1.0, 2e-4], [np.nextafter(np.float32(1), np.float32(0)), 0.0]], np.float32)
    found = Neighbours(np.zeros((1, 2), np.float32), 3, num_radii=1)
    found.add(np.arange(3), base, np.ones((3, 1)))
    assert found.ids.tolist() == [[2, 0, 1]]
    assert found.inside.tolist() == [[2]]  # the ball is closed


def test_distances_are_exact_and_symmetric():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((50, 77)).astype(np.float32) for _ in range(2))
    assert (exact_distances(x, x) == 0.0).all()
    assert (exact_distances(x, y) == exact_distances(y, x)).all()
    np.testing.assert_allclose(exact_distances(x, y), np.linalg.norm(x.astype(float) - y, axis=1), rtol=1e-14)


def test_a_small_base_leaves_places_empty():
    found = Neighbours(np.zeros((1, 2), np.float32), 3, np.array([5]))
    assert np.isinf(found.distances).all()
    found.add(np.array([5, 7]), np.ones((2, 2), np.float32))
    assert found.ids.tolist() == [[7, -1, -1]]
    assert found.distances.tolist() == [[np.sqrt(2.0), np.inf, np.inf]]


def test_what_is_refused():
    found = Neighbours(np.zeros((1, 2), np.float32), 1)
    with pytest.raises(ConfigError, match="of 3 and 2 dimensions"):
        found.add(np.array([1]), np.zeros((1, 3), np.float32))
    with pytest.raises(ConfigError, match="radii: 1 columns are not the announced 0"):
        found.add(np.array([1]), np.zeros((1, 2), np.float32), np.ones((1, 1)))
    with pytest.raises(ConfigError, match="features: those of row 0"):
        found.add(np.array([1]), np.full((1, 2), np.nan, np.float32))
