"""Reaching MLflow: its client, the settings it wants before it is imported, and its errors in one line."""

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient


def redact(text: str) -> str:
    """The text without the user names and passwords of the URIs in it.

    >>> redact("failed: https://ann:secret@mlflow.example:5000/api")
    'failed: https://***@mlflow.example:5000/api'
    """
    return re.sub(r"//[^/\s]+@", "//***@", text)


def reason(error: BaseException) -> str:
    """The first line of an error, without credentials, at most 200 characters."""
    code = getattr(error, "error_code", "")
    if code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"):
        return (
            f"{code}: the server refuses the credentials; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    cause = re.search(
        r"Connection refused|Name or service not known|Temporary failure in name resolution|No route to host|"
        r"Connection reset by peer|Remote end closed connection|timed out|certificate verify failed",
        text,
    )
    return cause.group(0) if cause else redact(text)[:200]


def configure_mlflow() -> None:
    """Settings that MLflow reads when it is imported; what the environment already says is kept.

    Short retries, because the spool is the retry: MLflow's own would block for minutes in an outage.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def sqlite_uri(path: Path) -> str:
    """The URI by which MLflow opens the SQLite database at a path.

    Where characters of the path mean something in a URI, they are escaped. Then the driver is named too, because for
    plain `sqlite:` MLflow makes a directory of the escaped name.

    >>> sqlite_uri(Path("/data/ddpm/mlflow.db")), sqlite_uri(Path("/data/why?/mlflow.db"))
    ('sqlite:////data/ddpm/mlflow.db', 'sqlite+pysqlite:////data/why%3F/mlflow.db')
    """
    text = str(path)
    if unquote(text) == text and "?" not in text:
        return f"sqlite:///{text}"
    return f"sqlite+pysqlite:///{quote(text)}"


def sqlite_path(uri: str) -> Path | None:
    """The file of the SQLite database that a URI names; None for any other store."""
    match = re.fullmatch(r"sqlite(?:\+pysqlite)?:///([^?]+)(?:\?.*)?", uri)
    return Path(unquote(match[1])) if match else None


@contextlib.contextmanager
def database_lock(uri: str) -> Iterator[None]:
    """Only one process at a time may create the tables of a SQLite file: two at once disturb each other."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def mlflow_client(uri: str) -> "MlflowClient":
    """A client of the server or database at `uri`, in a process that is set up for it."""
    configure_mlflow()
    import mlflow
    from mlflow import MlflowClient

    if urlsplit(uri).scheme not in ("http", "https"):
        # In front of a database MLflow resolves models:/ through the URI of the process. It also puts it into the
        # environment, where the next run of this process would take it for the user's wish.
        given = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri)
        if given is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
    with database_lock(uri):
        path = sqlite_path(uri)
        if path is not None and not path.exists():
            _make_database(path)
        return MlflowClient(uri)


def _make_database(path: Path) -> None:
    """Make MLflow's tables in a file beside it, which takes its place when it has them all.

    MLflow makes them step by step over seconds, and can never finish what a process that was killed has left. Whoever
    calls holds the lock.
    """
    from mlflow import MlflowClient

    begun, made = (path.with_name(f"{path.name}.{name}") for name in ("unfinished", "new"))
    for left in (begun, made):
        left.unlink(missing_ok=True)
    MlflowClient(sqlite_uri(begun))
    # A copy, as MLflow's connections to the first one stay open.
    with closing(sqlite3.connect(begun)) as source, closing(sqlite3.connect(made)) as target:
        source.backup(target)
    with contextlib.suppress(FileExistsError):  # made meanwhile by MLflow itself, which knows no lock
        os.link(made, path)
    for left in (begun, made):
        left.unlink()
