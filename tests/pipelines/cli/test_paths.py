"""Paths as users write them, also users without a home directory."""

import os
import pwd
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli import paths
from pipelines.cli.errors import ConfigError, StorageError
from pipelines.storage.location import Location


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user id that the machine does not know, as containers are given."""

    def unknown(uid: object) -> None:
        raise KeyError(uid)

    for name in ("HOME", "LOGNAME", "USER"):
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(paths, "_lent", None)


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    paths.lend_home()
    assert paths.expand_home("~/ddpm") == Path("/home/ann/ddpm")
    assert paths.expand_home("data/~x") == Path("data/~x")
    assert os.environ["HOME"] == "/home/ann"


def test_an_empty_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    paths.lend_home()
    assert paths.expand_home("~/ddpm") == Path(pwd.getpwuid(os.getuid()).pw_dir) / "ddpm"


@pytest.mark.parametrize("lent", [False, True])
def test_without_a_home_directory_the_option_is_named_and_paths_work(
    homeless: None, lent: bool, tmp_path: Path
) -> None:
    if lent:
        paths.lend_home()
    for written in ("~/ddpm", "~", "~nobody-of-that-name/ddpm"):
        with pytest.raises(ConfigError) as refusal:
            Location.parse(written)
        assert str(refusal.value).startswith(f"{written}: there is no such home directory; set HOME")
        assert "--root" in str(refusal.value)
    assert Location.parse("/data/ddpm").path == "/data/ddpm"


def test_libraries_get_a_private_directory_and_a_name(homeless: None, tmp_path: Path) -> None:
    paths.lend_home()
    paths.lend_home()
    assert Path.home() == tmp_path / f"ddpm-{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700
    assert os.environ["LOGNAME"] == str(os.getuid())


def test_a_directory_of_somebody_else_is_not_used(
    homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ddpm-12345").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        paths.lend_home()


NAMES = st.binary(min_size=1, max_size=30).map(lambda name: os.fsdecode(name.replace(b"\0", b"").replace(b"/", b"")))
ANY_NAME = NAMES.filter(lambda name: name not in ("", ".", ".."))


@given(st.lists(ANY_NAME, min_size=1, max_size=3))
def test_any_name_goes_through_a_file_uri_and_back(names: list[str]) -> None:
    path = Path("/no such root", *names)
    assert Location.parse(path.as_uri()).uri == str(path)
    assert Location.parse(path.as_uri().replace("file://", "file:", 1)).uri == str(path)
    assert Location.parse(path.as_uri().replace("file://", "file://localhost", 1)).uri == str(path)


@given(st.lists(ANY_NAME.filter(lambda name: "$" not in name), min_size=1, max_size=3))
def test_any_name_stays_as_it_is_given(names: list[str]) -> None:
    for uri in (str(Path("/no such root", *names)), "s3://bucket/" + "/".join(names)):
        location = Location.parse(uri)
        assert location.uri == uri
        assert Location.parse(location.uri) == location
        assert location.parent / location.name == location


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("file://data/x", r"location = 'file://data/x': names the host 'data'; .* write file:///path"),
        ("file://", "location = 'file://': names no path"),
        ("file:///a%00b", "holds a NUL character"),
    ],
)
def test_file_uris_that_name_no_path_of_this_machine_are_refused(uri: str, match: str) -> None:
    with pytest.raises(StorageError, match=match):
        Location.parse(uri)


def test_variables_are_replaced_and_one_that_is_not_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DATA", "s3://bucket/data")
    monkeypatch.setenv("FILES", "file:///some%20where")
    monkeypatch.delenv("NOT_SET", raising=False)
    for text, uri in (
        ("$HOME/ddpm", "/home/ann/ddpm"),
        ("${HOME}/ddpm", "/home/ann/ddpm"),
        ("/scratch$HOME/x", "/scratch/home/ann/x"),
        ("$DATA/x", "s3://bucket/data/x"),
        ("$FILES/x", "/some where/x"),
        ("/a/$5 or less/$", "/a/$5 or less/$"),
        ("file:///a/$HOME", "/a/$HOME"),
    ):
        assert Location.parse(text).uri == uri
    (tmp_path / "$HOME").mkdir()
    assert Location.parse(tmp_path / "$HOME").uri == str(tmp_path / "$HOME"), "it is there: it is what is meant"
    with pytest.raises(StorageError, match=r"^location = '\$NOT_SET/x': \$NOT_SET is not set; set it"):
        Location.parse("$NOT_SET/x")
    with pytest.raises(StorageError, match="is not set") as raised:
        Location.parse("s3://key:secret@bucket/${NOT_SET}")
    assert "secret" not in str(raised.value)


def test_every_spelling_of_a_path_is_one_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    expected = str(tmp_path / "a/b")
    for text in ("b", "./b/", "../a/b", "b/../b", f"/{expected}", f"{tmp_path}/none/../a//b", f"file:{expected}"):
        assert Location.parse(text).uri == expected
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    assert Location.parse(tmp_path / "link").uri == str(tmp_path / "link")
    assert Location.parse(f"{tmp_path}/link/../x").uri == str(tmp_path / "a/x"), "as the file system has it"
