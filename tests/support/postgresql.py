"""A real PostgreSQL for tests, on a free loopback port, with a password that would have to be escaped in a URI."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
from support.s3_store import free_ports

_PASSWORD = "p%40ss/w:rd@"
_START_TIMEOUT_S = 60
# PostgreSQL refuses to run as root.
_USER = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}


class NotInstalled(Exception):
    """PostgreSQL's programs are not on this machine."""


class PostgreSQL:
    """A server with one user and one database `mlflow`; `environment` says where, as libpq's programs want it.

    Raises:
        NotInstalled: As it says.
    """

    def __init__(self) -> None:
        self._programs = _programs()
        # Not below pytest's directory, into which only its user may look.
        self._directory = Path(tempfile.mkdtemp(prefix="ddpm-postgresql-"))
        if _USER:
            shutil.chown(self._directory, _USER["user"], _USER["group"])
        (port,) = free_ports(1)
        self.environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(port),
            "PGUSER": "mlflow",
            "PGDATABASE": "mlflow",
            "PGPASSWORD": _PASSWORD,
        }
        data, password = self._directory / "data", self._directory / "password"
        password.write_text(_PASSWORD)
        initdb = [self._programs / "initdb", "--pgdata", data, "--username", "mlflow", "--pwfile", password]
        options = ["--auth", "scram-sha-256", "--no-sync", "--encoding", "UTF8", "--locale", "C"]
        subprocess.run([*initdb, *options], **self._as_user(), check=True, stdout=subprocess.DEVNULL)
        with (self._directory / "output.log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"],
                **self._as_user(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._wait_until_ready()
        self.execute("CREATE DATABASE mlflow")

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """The rows of a statement, which is committed at once."""
        with self._connect(database) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def run(self, program: str, *arguments: str, content: bytes = b"") -> bytes:
        """One of PostgreSQL's programs (`pg_dump`, `psql`), on this server; `content` is its standard input."""
        command = [self._programs / program, *arguments]
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, input=content, env=environment, check=True, stdout=subprocess.PIPE).stdout

    def close(self) -> None:
        """End the server and remove what it kept."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _as_user(self) -> dict[str, object]:
        return {"cwd": self._directory, **_USER}

    def _connect(self, database: str) -> "psycopg.Connection[tuple[object, ...]]":
        of_libpq = {"PGHOST": "host", "PGPORT": "port", "PGUSER": "user", "PGPASSWORD": "password"}
        where = {name: self.environment[variable] for variable, name in of_libpq.items()}
        return psycopg.connect(**where, dbname=database, autocommit=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._connect("postgres").close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._directory / "output.log").read_text(errors="replace")[-2000:]
                    self.close()
                    raise RuntimeError(f"PostgreSQL did not start:\n{log}") from None
                time.sleep(0.05)  # between probes of a starting server; the loop above is the condition


def _programs() -> Path:
    """The directory of the newest installed version's programs; Debian's is not on PATH."""
    initdb = shutil.which("initdb")
    found = [Path(initdb).resolve().parent] if initdb else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or not (found[-1] / "pg_dump").exists():
        raise NotInstalled("PostgreSQL is not installed: apt-get install postgresql, or your system's package")
    return found[-1]
