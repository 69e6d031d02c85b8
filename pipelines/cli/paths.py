"""Paths of this machine as a user writes them, and what stands in for a home directory."""

import os
import re
import tempfile
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pipelines.cli.errors import ConfigError, StorageError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")

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


def with_variables(text: str) -> str:
    """The text with `$NAME` and `${NAME}` replaced as a shell would; a local path that exists is left as it is.

    Raises:
        StorageError: A variable is not set: a place of that name is hardly what is meant.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        value = os.environ.get(name)
        if not value or (name == "HOME" and _lent is not None):
            raise StorageError(f"location = {shown!r}: {match[0]} is not set; set it, or write the place out")
        return value

    shown = re.sub("://[^/]*@", "://...@", text)  # without credentials
    if "$" not in text or os.path.lexists(expand_home(text)):
        return text
    return _VARIABLE.sub(value_of, text)


def absolute_path(text: str) -> str:
    """The one name of a local path: absolute, `~` expanded, without `.`, doubled slashes and `..`.

    A link that the user names stays what it is called, unless `..` follows it: that leads to the directory above the
    one that the link leads to, as everywhere.

    Raises:
        StorageError: The path holds a NUL, which none can.
        ConfigError: There is no such home directory.
    """
    if "\0" in text:
        raise StorageError(f"location = {text!r}: holds a NUL character, which no path can; correct it")
    parts = Path(f"/{str(expand_home(text).absolute()).lstrip('/')}").parts
    if ".." in parts:
        climbed = len(parts) - parts[::-1].index("..")
        parts = (os.path.realpath(Path(*parts[:climbed])), *parts[climbed:])
    return str(Path(*parts))


def path_of_file_uri(uri: str) -> str:
    """The path that `file:/path`, `file:///path` or `file://localhost/path` names, percent-decoded (RFC 8089).

    Raises:
        StorageError: It names another host, or no path.
    """
    rest = uri.removeprefix("file:")
    host, path = "", rest
    if rest.startswith("//"):
        host, separator, path = rest[2:].partition("/")
        path = separator + path
    if host.startswith("~"):  # no host, although RFC 8089 would have it so
        host, path = "", host + path
    if host not in ("", "localhost"):
        raise StorageError(
            f"location = {uri!r}: names the host {host!r}; for a path of this machine write file:///path"
        )
    if path in ("", "/") and rest != "///":
        raise StorageError(f"location = {uri!r}: names no path; write file:///path")
    return os.fsdecode(unquote_to_bytes(os.fsencode(path)))


def lend_home() -> None:
    """For a user without home directory and name, give libraries, which keep tokens and caches there, another one.

    It is not what `~` in a path stands for: that stays an error.

    Raises:
        ConfigError: It belongs to somebody else.
    """
    global _lent
    if os.environ.get("HOME") == "":
        del os.environ["HOME"]  # it would stand for the root directory
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
