"""A job run as its user runs it: a process of its own, whose lines can be waited for."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run_job(job: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python jobs/JOB.py ARGUMENTS` to its end in a directory that is not the repository and is its home, without
    what the environment says of Ray and MLflow."""
    outside = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in outside}
    command = [sys.executable, str(REPOSITORY / "jobs" / job), *arguments]
    return subprocess.run(command, cwd=root, env={**environment, "HOME": str(root)}, capture_output=True, text=True)


def check_refusals(
    job: str, root: Path, arguments: Sequence[str], refused: Iterable[tuple[list[str], int, str]]
) -> None:
    """Assert that the job, which is given `arguments` and those of each case, ends with the case's exit code, its line
    last, and leaves the empty directory `root` empty."""
    for added, code, line in refused:
        ended = run_job(job, root, *arguments, *added)
        assert (ended.returncode, ended.stdout) == (code, "")
        *said, message = ended.stderr.splitlines()  # what the job is at, and how it ended
        assert message.startswith(f"error: {line}")
        assert not any("error" in each for each in said)
    assert list(root.iterdir()) == []


class JobProcess:
    """`python jobs/NAME.py ARGUMENTS` (or another program); what it prints is kept in `text`.

    `on` are words before the command that say where it runs.
    """

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None, on: Sequence[str] = ()) -> None:
        own = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        self._process = subprocess.Popen(
            [*on, sys.executable, *arguments],
            cwd=REPOSITORY,
            env={**own, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.text += line

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 420.0) -> None:
        """Return when `condition` holds; fail when the job ends before, or it takes too long."""
        until(condition, timeout_s, lambda: self._process.poll() is not None, lambda: self.text)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the driver alone."""
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout_s: float = 420.0) -> int:
        """The exit code, when the job has ended and all it printed has been read."""
        code = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def close(self) -> None:
        """End it, however far it is."""
        self._process.kill()
        self._process.wait()


def until(
    condition: Callable[[], object],
    timeout_s: float,
    ended: Callable[[], bool] = lambda: False,
    told: Callable[[], str] = lambda: "",
) -> None:
    """Poll until `condition` holds; AssertionError with what was `told` when it `ended` before or took too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        over = ended()
        if (over and not condition()) or time.monotonic() > deadline:
            raise AssertionError(f"{'ended' if over else f'not within {timeout_s:g} s'}:\n{told()}")
        time.sleep(0.2)
