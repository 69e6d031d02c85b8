"""Which code made an output: the package version and a hash of its sources."""

import hashlib
import os
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).parents[2]


@lru_cache
def code_version() -> str:
    """`0.1.0+src.0123456789ab`: works in an uploaded working directory too, where there is no git history."""
    total = hashlib.sha256()
    for package in ("ddpm_core", "pipelines"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            total.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    try:
        release = version("ddpm-pipeline")
    except PackageNotFoundError:
        release = "0"
    return f"{release}+src.{total.hexdigest()[:12]}"


@lru_cache
def git_commit() -> str | None:
    """The commit that DDPM_GIT_COMMIT names, for a tree that was uploaded without its history, or else the checked-out
    one; None where there is neither."""
    if given := os.environ.get("DDPM_GIT_COMMIT"):
        return given
    command = ["git", "-C", str(_ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
