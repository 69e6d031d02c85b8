"""Places that overlap are told apart by what they are, not by how they are spelled."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli.errors import ConfigError
from pipelines.storage.location import Location
from pipelines.storage.ownership import (
    begun_by,
    claim,
    delete_files,
    first_file,
    overlap,
    owner_of,
    require_apart,
)

PARTS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=4)
OPPOSITE = {"is": "is", "lies in": "holds", "holds": "lies in", None: None}


def respelled(draw: st.DrawFn, parts: list[str], protocols: list[str]) -> str:
    """`parts` below a bucket, with `..`, `.` and doubled slashes in between."""
    text = draw(st.sampled_from(protocols)) + "bucket"
    for part in parts:
        text += draw(st.sampled_from(["/", "//", "/./", "/x/../", "/x/y/../../"])) + part
    return text + draw(st.sampled_from(["", "/", "//"]))


@given(st.data(), PARTS, PARTS)
def test_keys_are_compared_whatever_their_spelling(data: st.DataObject, one: list[str], other: list[str]) -> None:
    first, second = (Location.parse(respelled(data.draw, parts, ["s3://", "s3a://"])) for parts in (one, other))
    shared = min(len(one), len(other))
    expected = None
    if one[:shared] == other[:shared]:
        expected = "is" if len(one) == len(other) else "lies in" if len(one) > len(other) else "holds"
    assert overlap(first, second) == expected
    assert overlap(second, first) == OPPOSITE[expected]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("photos", "is"),
        ("photos/../photos/", "is"),
        ("link", "is"),
        ("photos/new/er", "lies in"),
        ("link/new", "lies in"),
        ("link/cats/../new", "lies in"),
        ("loop/link/new", "lies in"),
        (".", "holds"),
        ("photos/..", "holds"),
        ("photographs", None),
        ("photos-prepared", None),
        ("link/../elsewhere", None),
    ],
)
def test_local_paths_are_compared_by_what_they_lead_to(tmp_path: Path, output: str, expected: str | None) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "loop").symlink_to(tmp_path)
    place, source = Location(f"{tmp_path}/{output}"), Location.parse(tmp_path / "photos")
    assert overlap(place, source) == expected
    assert overlap(source, place) == OPPOSITE[expected]
    if expected:
        with pytest.raises(ConfigError, match=f"^output = {place}: {expected} the source {source}; choose a place"):
            require_apart(place, source, "the source")
    else:
        require_apart(place, source, "the source")


def test_a_place_that_has_two_names_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a bind mount, or where letter case makes no difference: the same inode under two paths."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "PHOTOS").mkdir()
    real, same = Path.stat, (tmp_path / "photos").stat()
    monkeypatch.setattr(Path, "stat", lambda path, **more: same if path.name == "PHOTOS" else real(path, **more))
    assert overlap(Location.parse(tmp_path / "PHOTOS" / "out"), Location.parse(tmp_path / "photos")) == "lies in"


def test_stores_and_disks_are_apart() -> None:
    assert overlap(Location.parse("s3://bucket/a"), Location.parse("/bucket/a")) is None
    assert overlap(Location.parse("s3://bucket/a"), Location.parse("s3://bucke/a")) is None


def test_any_file_tells_that_a_place_is_taken(tmp_path: Path) -> None:
    place, leftover = Location.parse(tmp_path), f".first.{'0' * 32}.tmp"
    assert first_file(place / "nothing") is None
    (tmp_path / "empty" / "er").mkdir(parents=True)
    assert first_file(place) is None
    (tmp_path / leftover).touch()
    assert first_file(place, "first") is None
    assert first_file(place) == first_file(place, "other") == first_file(place, "in/first") == leftover
    (tmp_path / leftover).unlink()
    (tmp_path / "empty" / "er" / "link").symlink_to(tmp_path)
    assert first_file(place) == "empty/er/link"


def test_names_to_delete_are_no_patterns_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out" / "a[1]").mkdir(parents=True)
    for path in ("out/a[1]/x*", "out/a[1]/xy", "kept"):
        (tmp_path / path).touch()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "kept")
    delete_files(Location.parse(tmp_path / "out"), ["a[1]/x*", "link"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a[1]", "kept", "out", "xy"]


def test_one_bounded_request_tells_that_a_prefix_is_taken(s3_prefix: str) -> None:
    place, asked = Location.parse(s3_prefix), []
    for index in range(3):
        (place / "taken" / f"{index}").write_bytes(b"")
    (Location.parse(f"{s3_prefix}/taken-too") / "x").write_bytes(b"")
    events = place.fs.connect().meta.events
    events.register("before-call.s3", lambda model, params, **more: asked.append((model.name, params)), unique_id="ask")
    try:
        assert first_file(place / "taken") == "0"
        assert first_file(place / "take") is None
    finally:
        events.unregister("before-call.s3", unique_id="ask")
    assert [name for name, _ in asked] == ["ListObjectsV2"] * 2
    assert all(int(params["query_string"]["max-keys"]) <= 100 for _, params in asked)


def test_the_first_to_claim_a_directory_is_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Location.parse(tmp_path)
    assert owner_of(directory) is None
    assert begun_by(None) == ""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "vision")
    claim(directory)
    assert begun_by(owner_of(directory)) == ""  # nobody is told their own name
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "speech")
    claim(directory)
    assert (owner_of(directory), begun_by(owner_of(directory))) == ("vision", ", begun by vision")
