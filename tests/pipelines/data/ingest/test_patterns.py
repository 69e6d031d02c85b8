"""Names and patterns: what is there under its very name is taken as it is, on a disk and in stores."""

from contextlib import suppress
from pathlib import Path

import pytest

from pipelines.cli.errors import DataError
from pipelines.data.ingest.patterns import local_folders, local_matches, split_pattern
from pipelines.data.ingest.sources import open_source
from pipelines.storage.location import Location

NAMES = ("runs [2024]/x", "what?", "star*", "[a-z]", "two  spaces", "100%25", "#1", "a+b=c&d")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.parse(tmp_path if request.param == "local" else request.getfixturevalue(f"{request.param}_prefix"))


def files_of(uri: str) -> list[str]:
    """The paths that a source holds, all of which can be read."""
    found, files = open_source(uri)[:2]
    for file in files:
        assert (found.base / file).read_bytes() == b"image"
    return sorted(files)


def test_directories_of_any_name_are_sources(root: Location) -> None:
    for name in NAMES:
        for file in ("0.png", "sub [1]/2?.png"):
            (root / name / file).write_bytes(b"image")
    (root / "what!" / "other.png").write_bytes(b"image")
    for name in NAMES:
        assert files_of((root / name).uri) == ["0.png", "sub [1]/2?.png"]
        # One file by its name, and a pattern below a literal name that looks like one.
        assert files_of((root / name / "sub [1]/2?.png").uri) == ["2?.png"]
        assert files_of((root / name / "**/*.png").uri) == ["0.png", "sub [1]/2?.png"]
        assert files_of((root / name / "sub [1]/?[?].png").uri) == ["2?.png"]
    assert files_of((root / "what[!?]/*.png").uri) == ["what!/other.png"]
    with pytest.raises(DataError, match="nothing is there"):
        files_of((root / "[0-9]").uri)


def test_what_is_literal_ends_where_the_pattern_begins(tmp_path: Path) -> None:
    (tmp_path / "a[1]" / "b").mkdir(parents=True)
    (tmp_path / "a[1]" / "b" / "c.png").write_bytes(b"image")
    base, pattern = split_pattern(Location.parse(tmp_path / "a[1]/*/c?png"))
    assert (base.uri, pattern) == (str(tmp_path / "a[1]"), "*/c?png")
    assert [*local_matches(base, pattern)] == [str(tmp_path / "a[1]/b/c.png")]
    assert [*local_folders(base, pattern)] == [str(tmp_path / "a[1]"), str(tmp_path / "a[1]/b")]
    assert split_pattern(Location.parse(tmp_path / "a[1]")) == (Location.parse(tmp_path / "a[1]"), "")
    assert split_pattern(Location("/*.png")) == (Location("/"), "*.png")


def test_a_relative_pattern_works_in_a_directory_of_any_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "[old] *").mkdir()
    (tmp_path / "[old] *" / "0.png").write_bytes(b"image")
    monkeypatch.chdir(tmp_path / "[old] *")
    assert files_of("*.png") == files_of(".") == ["0.png"]
    Path("1.png").symlink_to("0.png")
    with pytest.raises(DataError, match=r"'1\.png' is a symbolic link"):
        files_of("*.png")


def test_doubled_slashes_in_a_key_are_read(s3_prefix: str) -> None:
    """Whether the store keeps them, or takes them for one."""
    prefix = Location.parse(s3_prefix)
    bucket = prefix.parent.uri
    (prefix / "plain/0.png").write_bytes(b"image")
    Location.parse(f"{bucket}//{prefix.name}/lead/1.png").write_bytes(b"image")
    assert files_of(f"{bucket}//{prefix.name}/lead") == ["1.png"]
    assert files_of(f"{bucket}//{prefix.name}/lead/*.png") == ["1.png"]
    assert files_of(f"{bucket}//{prefix.name}/lead/1.png") == ["1.png"]
    with suppress(DataError):  # that nothing is there
        assert files_of(f"{bucket}//{prefix.name}/plain") == ["0.png"]


@pytest.mark.parametrize("pattern", ["*/*.png", "**/*.png", "cats*/*.png"])
def test_a_pattern_does_not_reach_through_a_linked_directory(tmp_path: Path, pattern: str) -> None:
    for directory in ("in/cats", "elsewhere"):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "0.png").write_bytes(b"image")
    (tmp_path / "in" / ".hidden").symlink_to(tmp_path / "elsewhere")
    assert files_of(str(tmp_path / "in" / pattern)) == ["cats/0.png"]
    (tmp_path / "in" / "cats2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"'cats2' is a symbolic link \(to '.*elsewhere'\), which is not followed"):
        files_of(str(tmp_path / "in" / pattern))
