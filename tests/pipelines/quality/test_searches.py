"""Searches for neighbours: which there are, how they are cut into parts, and what a part holds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_core.sets import NUM_GROUPS
from pipelines.outputs.shards import shard_name
from pipelines.quality.extractors.request import ExtractorRequest
from pipelines.quality.features import FeatureSet, encode_features
from pipelines.quality.request import ClassRequest, QualityRequest, Role, SideRequest, Space
from pipelines.quality.searches import (
    NEIGHBOURS,
    OWN,
    NeighbourShards,
    Sides,
    Stage,
    found_by,
    lists_of,
    parts,
    radii_in,
    searches,
)
from pipelines.storage.location import Location

K = 2
PIXELS = ExtractorRequest("pixels", None, 16, (4, 4, 1), "levels / 255")


def request(**fields: object) -> QualityRequest:
    """50 samples and 70 reference images in blocks of 20."""
    asked = QualityRequest(
        samples=SideRequest("s" * 64, 50),
        reference=SideRequest("r" * 64, 70),
        extractor=PIXELS,
        neighbours=K,
        classes=(),
        batch_size=8,
        shard_size=16,
        block_size=20,
        device="cpu",
    )
    return replace(asked, **fields)


def feature_set(path: Path, features: np.ndarray, labels: np.ndarray) -> FeatureSet:
    """In shards of 16, written as the job writes them."""
    shards = []
    for index, first in enumerate(range(0, len(features), 16)):
        rows = slice(first, first + 16)
        ids = np.arange(first, min(first + 16, len(features)))
        images = np.zeros((len(ids), 1, 1, 1), np.uint8)
        name = shard_name(index, ".parquet")
        content = encode_features(ids, features[rows].astype(np.float32), images, labels[rows])
        Location.parse(path / "data" / name).write_bytes(content)
        shards.append((name, first, len(ids)))
    return FeatureSet(Location.parse(path), len(features), tuple(shards))


@pytest.fixture
def features() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        role: random.normal(size=(count, 16)).astype(np.float32) for role, count in (("samples", 50), ("reference", 70))
    }


@pytest.fixture
def sets(tmp_path: Path, features: dict[str, np.ndarray]) -> dict[tuple[Role, Space], FeatureSet]:
    return {
        (role, "features"): feature_set(tmp_path / role, values, np.arange(len(values)) % 2)  # type: ignore[misc]
        for role, values in features.items()
    }


def made(
    at: Path, asked: QualityRequest, sets: Mapping[tuple[Role, Space], FeatureSet], order: int = 1
) -> tuple[Location, Sides]:
    """Every part of both stages, computed and stored, the last one first where `order` is -1."""
    location = Location.parse(at)
    stages: tuple[Stage, ...] = (OWN, NEIGHBOURS)
    for stage in stages:
        compute = NeighbourShards(location, asked, sets, stage, 1)()
        for index in range(len(parts(asked, stage)))[::order]:
            (location / stage / shard_name(index, ".parquet")).write_bytes(compute(index).data)
    return location, Sides(asked, sets)


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x[:, None].astype(float) - y[None].astype(float)).sum(2))


def test_parts_cover_every_query_of_every_search_once() -> None:
    sides = {"train": SideRequest("t" * 64, 90, 9, "trained"), "unseen": SideRequest("t" * 64, 90, 9, "held_out")}
    asked = request(classes=(ClassRequest(1, 25, 35),), **sides, pixels=PIXELS)
    for stage, queries in ((OWN, [50, 70, 25, 35]), (NEIGHBOURS, [50, 70, 25, 35, 50, 10, 50, 10])):
        found = searches(asked, stage)
        assert [search.num_queries for search in found] == queries
        assert len(set(found)) == len(found)
        for search in found:
            own = [(part.start, part.stop) for part in parts(asked, stage) if part.search == search]
            assert [start for start, _ in own] == list(range(0, search.num_queries, 20))
            assert own[-1][1] == search.num_queries
    assert [search.num_base for search in searches(asked, NEIGHBOURS)[4:]] == [80] * 4


def test_the_nearest_and_the_balls_are_those_of_all_distances(
    tmp_path: Path, features: dict[str, np.ndarray], sets: dict[tuple[Role, Space], FeatureSet]
) -> None:
    asked = request()
    location, sides = made(tmp_path / "out", asked, sets)
    own = distances(features["reference"], features["reference"])
    np.fill_diagonal(own, np.inf)
    to_reference, found = distances(features["samples"], features["reference"]), searches(asked, NEIGHBOURS)[0]
    lists = lists_of(location, asked, found)
    assert lists.ids.tolist() == list(range(50))
    assert (lists.neighbours[:, 0] == to_reference.argmin(1)).all()
    assert lists.distances[:, 0] == pytest.approx(to_reference.min(1))
    groups, balls = sides.groups("reference"), radii_in(location, asked, sides, "reference", None)
    for column in range(1 + NUM_GROUPS):  # the definition, without the balls of the column's group
        there = groups != column - 1
        radii = np.sort(own, 1)[:, K - 1]
        assert balls[there, column] == pytest.approx(radii[there])
        assert (balls[~there, column] < 0.0).all()
        expected = (to_reference <= radii * (1 + 1e-12))[:, there].sum(1)
        inside = np.concatenate([part.inside for part in found_by(location, asked, found)])
        assert (inside[:, column] == expected).all()


def test_a_class_sees_its_own_rows_only(
    tmp_path: Path, features: dict[str, np.ndarray], sets: dict[tuple[Role, Space], FeatureSet]
) -> None:
    asked = request(classes=(ClassRequest(1, 25, 35),))
    location, sides = made(tmp_path / "out", asked, sets)
    search = next(each for each in searches(asked, NEIGHBOURS) if (each.queries, each.label) == ("samples", 1))
    lists = lists_of(location, asked, search)
    assert lists.ids.tolist() == list(range(1, 50, 2)) == sides.rows("samples", 1).tolist()
    nearest = distances(features["samples"][1::2], features["reference"][1::2]).argmin(1)
    assert (lists.neighbours[:, 0] == 1 + 2 * nearest).all()


def test_neither_the_order_of_parts_nor_their_size_changes_what_is_found(
    tmp_path: Path, sets: dict[tuple[Role, Space], FeatureSet]
) -> None:
    found = []
    for name, asked, order in (("a", request(), 1), ("b", request(), -1), ("c", request(block_size=33), 1)):
        location, _ = made(tmp_path / name, asked, sets, order)
        lists = [lists_of(location, asked, search) for stage in (OWN, NEIGHBOURS) for search in searches(asked, stage)]
        found.append(
            [np.concatenate([getattr(each, field).ravel() for each in lists]) for field in ("distances", "neighbours")]
        )
    for other in found[1:]:
        for values, same in zip(found[0], other, strict=True):
            assert np.array_equal(values, same)
