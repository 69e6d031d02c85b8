"""Paths of this machine as a user writes them, and what stands in for a home directory."""

import os
import tempfile
from pathlib import Path

from ddpm_core.errors import ConfigError

_lent: Path | None = None


def expand_home(path: str) -> Path:
    """The path with a leading `~` or `~user` replaced by that home directory.

    Raises:
        ConfigError: There is none, as for a container's user without a name.
    """
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        expanded = None
    if expanded is None or (_lent is not None and Path(path).parts[:1] == ("~",)):
        raise ConfigError(
            f"{path}: there is no such home directory; set HOME, or give an absolute path, such as --root /data/ddpm"
        )
    return expanded


def lend_home() -> None:
    """For a user without home directory and name, give libraries, which keep tokens and caches there, another one.

    It is not what `~` in a path stands for: that stays an error.

    Raises:
        ConfigError: It belongs to somebody else.
    """
    global _lent
    try:
        Path.home()
    except RuntimeError:
        lent = Path(tempfile.gettempdir()) / f"ddpm-{os.getuid()}"
        lent.mkdir(mode=0o700, exist_ok=True)
        if lent.stat().st_uid != os.getuid():
            raise ConfigError(f"{lent}: belongs to another user; set HOME to a directory of your own") from None
        _lent = lent
        os.environ["HOME"] = str(lent)
        os.environ.setdefault("LOGNAME", str(os.getuid()))
