"""What a person sees: events, a progress line with rate and ETA, errors in one line, exit codes."""

import io
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.status import Status
from rich.text import Text

from pipelines.cli.errors import DDPMError, exit_code
from pipelines.cli.paths import lend_home

# stderr, so that what a job prints on stdout can be piped; a fixed width where there is no terminal to ask.
console = Console(stderr=True, highlight=False, soft_wrap=True)
_lock = threading.Lock()
# Between two lines that say what is waited for: five seconds, and something in hand for a busy interpreter.
HEARTBEAT_S = 4.0


class Interrupted(BaseException):
    """SIGINT or SIGTERM reached the job.

    `code` is the exit status (130 or 143). `kept` ends the line for the user: whoever knows what there is to go on
    from sets it on the exception's way up.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.code = 128 + signum
        self.kept = "run the same command to continue"


# `uv run`, `ray job stop` and terminals send one request to stop several times within moments.
_SAME_REQUEST_S = 1.0
_again = threading.Event()


def interrupted_again() -> bool:
    """Whether another signal came after the one that raised `Interrupted`: nothing more should be waited for."""
    return _again.is_set()


def event(message: str) -> None:
    """Print one line about something that happened."""
    global _last_said
    with _lock:
        _last_said = time.monotonic()
        console.print(printable(message), markup=False, emoji=False)


def printable(text: str) -> str:
    r"""The text with control characters escaped: a file's name must not add lines or speak to the terminal.

    >>> printable("a\nb\x1b[2J")
    'a\\nb\\x1b[2J'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def plus_minus(value: float, error: float | None) -> str:
    """A mean with its standard error, which is not known (None, or not finite in older files) of one image.

    >>> plus_minus(5.17, 0.04), plus_minus(5.17, None)
    ('5.1700 ± 0.0400', '5.1700 ± n/a')
    """
    return f"{value:.4f} ± " + (f"{error:.4f}" if error is not None and math.isfinite(error) else "n/a")


def with_interval(found: Mapping[str, float]) -> str:
    """A number with its interval, which are its `value`, `low` and `high`.

    >>> with_interval({"value": 12.3456, "low": 11.9, "high": 12.81})
    '12.346 (11.900 to 12.810)'
    >>> with_interval({"value": 0.00123, "low": -1e-4, "high": 0.0025})
    '0.00123 (-0.00010 to 0.00250)'
    """
    digits = 3 if abs(found["value"]) >= 0.1 else 5
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def run_job(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a job's `main(argv)` and exit with `exit_code_of` it.

    What the terminal's encoding lacks is printed as an escape, such as `\\xb1`: it must not end the job.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = exit_code_of(main)
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything has been closed that must be. What libraries do at exit (Ray above all, when a training was given
    # up) could only turn this exit code into another.
    os._exit(code)


def exit_code_of(main: Callable[[Sequence[str]], None]) -> int:
    """Run a job's `main(argv)`: 0 done, 1 failed, 2 bad usage or config, 130/143 interrupted.

    Errors of the project's own tree become one line. Anything else is a defect: it also gets one line, and
    its stack trace is printed when the environment has DDPM_DEBUG=1.
    """

    requests: list[float] = []
    _again.clear()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        # A second request ends the waiting, but must not interrupt the cleaning up after the first; a third is a kill.
        if requests and time.monotonic() - requests[-1] < _SAME_REQUEST_S:
            return
        requests.append(time.monotonic())
        if len(requests) == 1:
            raise Interrupted(signum)
        if len(requests) > 2:
            os._exit(128 + signum)
        _again.set()

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    code = 0
    try:
        lend_home()
        main(sys.argv[1:])
    except Interrupted as stop:
        event(f"interrupted by {stop}: {stop.kept}")
        code = stop.code
    except DDPMError as error:
        event(f"error: {error}")
        code = exit_code(error)
    except SystemExit as stop:  # --help, --print_config
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception as error:
        if os.environ.get("DDPM_DEBUG") == "1":
            traceback.print_exc()
        text = (str(error).strip() or "no message").splitlines()[0]
        event(f"error: unexpected {type(error).__name__}: {text} (set DDPM_DEBUG=1 for the stack trace)")
        code = 1
    return code


@contextmanager
def printing_to(descriptor: int) -> Iterator[None]:
    """Print to an open file descriptor for the time of a block, which leaves it open."""
    own = sys.stderr if isinstance(sys.stderr, io.TextIOWrapper) else None
    encoding, errors = (own.encoding, own.errors) if own else ("utf-8", "backslashreplace")
    stream = os.fdopen(os.dup(descriptor), "w", encoding=encoding, errors=errors)
    with _lock:
        before, console._file = console._file, stream
    try:
        yield
    finally:
        with _lock:  # a waiting thread may be printing
            console._file = before
        stream.close()


_last_said = 0.0


class Waiting:
    """Says what is waited for until it is closed: a line that counts the seconds on a terminal, elsewhere (job logs) a
    line whenever nothing has been said for some seconds.

    Args:
        what: Such as "starting 2 workers".
        at_once: Say it now, not only when it has taken a second.
    """

    def __init__(self, what: str, at_once: bool = False) -> None:
        self._what, self._began, self._over = what, time.monotonic(), threading.Event()
        self._status: Status | None = None
        self._next_s, self._said = (0.0 if at_once else 1.0), False
        if at_once:
            self._say()
        self._thread = threading.Thread(target=self._tick, name="waiting", daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        while not self._over.wait(max(0.0, self._began + self._next_s - time.monotonic())):
            silence = time.monotonic() - _last_said
            if self._said and silence < HEARTBEAT_S / 2:  # another wait, of which this is a part, or a part of it
                self._next_s += HEARTBEAT_S - silence
            else:
                self._say()

    def _say(self) -> None:
        seconds = time.monotonic() - self._began
        line = f"{self._what}: {int(seconds)} s so far" if self._said else self._what
        self._said = True
        if console.is_terminal and not console.is_dumb_terminal:
            self._next_s = seconds + 1.0
            self._status = self._status or console.status("", spinner="line")
            self._status.update(Text(printable(line)))
            self._status.start()
        else:
            self._next_s = seconds + HEARTBEAT_S
            event(line)

    def close(self) -> None:
        """It is over; closing twice does no harm."""
        self._over.set()
        self._thread.join()
        if self._status is not None:
            self._status.stop()


@contextmanager
def waiting(what: str, at_once: bool = False) -> Iterator[None]:
    """`Waiting`, for the time of a block."""
    wait = Waiting(what, at_once)
    try:
        yield
    finally:
        wait.close()


class ProgressLine:
    """A progress bar with rate and ETA on a terminal; one plain line every few percent elsewhere (job logs).

    Until there is a rate, it says that it waits for `first`, such as "starting 2 workers", if that is given.
    """

    def __init__(self, label: str, total: int, unit: str, first: str | None = None) -> None:
        self._label, self._total, self._unit = label, max(total, 1), unit
        self._last_printed = -1.0
        self._bar: Progress | None = None
        self._lock = threading.Lock()
        self._waiting = Waiting(first) if first else None

    def update(self, done: int, rate: float, detail: str = "") -> None:
        """Show `done` of the total; `rate` is in units per second and gives the ETA; below 1, its inverse is shown."""
        with self._lock:
            if self._waiting is not None:
                if rate <= 0 and done < self._total:
                    return
                self._waiting.close()
                self._waiting = None
            fraction = done / self._total
            eta = clock((self._total - done) / rate) if rate > 0 else "?"
            slow = 0 < rate < 1
            speed = f"{1 / rate:,.1f} s/{self._unit.removesuffix('s')}" if slow else f"{rate:,.1f} {self._unit}/s"
            line = f"{self._label} {done:,}/{self._total:,} ({fraction:.0%})  ETA {eta}  {speed}"
            line = f"{line} {detail}".rstrip()
            if console.is_terminal:
                self._show(done, line)
            elif fraction - self._last_printed >= 0.05 or fraction >= 1 > self._last_printed:
                self._last_printed = fraction
                event(line)

    def wait_for(self, first: str) -> None:
        """Say from now on, until there is a rate, that this is what it waits for."""
        with self._lock:
            if self._waiting is not None:
                self._waiting.close()
                self._waiting = Waiting(first)

    def _show(self, done: int, line: str) -> None:
        if self._bar is None:
            # On a narrow terminal the bar gives way first, not the numbers.
            columns = BarColumn(bar_width=20), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(line, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=done, description=line)

    def close(self) -> None:
        """Take it off the terminal."""
        with self._lock:
            if self._waiting is not None:
                self._waiting.close()
            if self._bar is not None:
                self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> clock(3725.2), clock(65)
    ('1:02:05', '1:05')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def summary(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print the closing summary of a job: a title and aligned name-value rows, on stdout."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{printable(title)}")
    for name, value in rows:
        print(f"  {name:<{width}}  {printable(value)}")
    sys.stdout.flush()
