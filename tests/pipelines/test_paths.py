"""Paths as users write them, also users without a home directory."""

import os
import tempfile
from pathlib import Path

import pytest

from ddpm_core.errors import ConfigError
from pipelines import paths
from pipelines.storage import Location


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
