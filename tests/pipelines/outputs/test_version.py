"""Which code made an output."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.outputs.version import code_version, git_commit

ROOT = Path(__file__).parents[3]


def version_of(tree: Path) -> list[str]:
    """code_version() and git_commit() of a copy of the sources, as an uploaded working directory has them."""
    command = "from pipelines.outputs.version import code_version, git_commit; print(code_version(), git_commit())"
    run = subprocess.run([sys.executable, "-c", command], cwd=tree, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_the_version_follows_the_sources_and_needs_no_git(tmp_path: Path) -> None:
    assert re.fullmatch(r"\d+(\.\d+)*\S*\+src\.[0-9a-f]{12}", code_version())
    for package in ("ddpm_core", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert version_of(tmp_path) == [code_version(), "None"]
    with (tmp_path / "ddpm_core/counter_random.py").open("a") as file:
        file.write("\n")
    assert version_of(tmp_path)[0] != code_version()


def test_the_commit_is_that_of_the_checkout_or_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_commit() is None or re.fullmatch("[0-9a-f]{40}", git_commit())
    monkeypatch.setenv("DDPM_GIT_COMMIT", "abc")
    git_commit.cache_clear()
    assert git_commit() == "abc"
    git_commit.cache_clear()
