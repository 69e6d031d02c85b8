"""What a comparison answers: which numbers it is about, and what makes two of them comparable."""

from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_core.sets import fewest_images
from pipelines.quality.extractors.request import ExtractorRequest
from pipelines.quality.request import MOST_FEATURES, QualityRequest, SideRequest
from pipelines.storage.location import Location

PIXELS = ExtractorRequest("pixels", None, 16, (4, 4, 1), "levels / 255")
ASKED = QualityRequest(SideRequest("s" * 64, 50), SideRequest("r" * 64, 70), PIXELS, 5, (), 8, 16, 20, "cpu")


def test_it_is_stored_and_read_again(tmp_path: Path) -> None:
    side = SideRequest("t" * 64, 90, 9, "held_out")
    for asked in (ASKED, replace(ASKED, train=replace(side, part="trained"), unseen=side, pixels=PIXELS)):
        assert QualityRequest.from_json(asked.to_json(), Location.parse(tmp_path)) == asked


def test_it_is_about_the_frechet_distance_where_a_covariance_has_full_rank_and_else_about_kid() -> None:
    assert ASKED.headline == "fd"
    few = replace(ASKED, samples=SideRequest("s" * 64, fewest_images(16) - 1))
    assert few.headline == "kid"
    assert replace(few, samples=SideRequest("s" * 64, fewest_images(16))).headline == "fd"
    large = replace(PIXELS, num_features=MOST_FEATURES + 1)
    assert replace(ASKED, extractor=large, samples=SideRequest("s" * 64, 10**6)).headline == "kid"


@pytest.mark.parametrize(
    "fields",
    [
        {"samples": SideRequest("s" * 64, 51)},
        {"reference": SideRequest("q" * 64, 70)},
        {"extractor": replace(PIXELS, preprocessing="levels")},
        {"neighbours": 6},
        {"resize": "bicubic"},
    ],
    ids=str,
)
def test_another_way_of_measuring_has_another_stamp(fields: dict[str, object]) -> None:
    assert replace(ASKED, **fields).stamp != ASKED.stamp


def test_other_samples_and_another_way_of_computing_the_same_have_the_same_stamp() -> None:
    assert replace(ASKED, samples=SideRequest("z" * 64, 50), block_size=40).stamp == ASKED.stamp


def test_memorisation_compares_only_with_the_same_training_and_unseen_images() -> None:
    one, two = (replace(ASKED, train=SideRequest(name * 64, 90), unseen=ASKED.reference) for name in "tu")
    assert one.stamp == two.stamp
    assert one.memory_stamp != two.memory_stamp


def test_the_rows_of_a_part_are_those_that_training_held_out_or_the_others() -> None:
    held_out, trained = (SideRequest("t" * 64, 90, 9, part) for part in ("held_out", "trained"))
    assert len(held_out.rows) == 10
    assert sorted([*held_out.rows, *trained.rows]) == list(range(90))
