"""What a person sees: exit codes, errors in one line, progress in a job's log, the closing summary."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import pytest
from support.job_process import REPOSITORY

from pipelines.cli import console
from pipelines.cli.console import Interrupted, ProgressLine, clock, event, exit_code_of, summary, waiting
from pipelines.cli.errors import ConfigError, DataError
from pipelines.cluster.connection import _silence


@pytest.fixture(autouse=True)
def _restore_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def failing(error: BaseException) -> Callable[[Sequence[str]], None]:
    def main(argv: Sequence[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("train.steps = 0: must be at least 1"), 2, "error: train.steps = 0: must be at least 1"),
        (DataError("/data [x] /y: is empty"), 1, "error: /data [x] /y: is empty"),  # no markup is read into it
        (
            ZeroDivisionError("first\nsecond"),
            1,
            "error: unexpected ZeroDivisionError: first (set DDPM_DEBUG=1 for the stack trace)",
        ),
        (RuntimeError(), 1, "error: unexpected RuntimeError: no message (set DDPM_DEBUG=1 for the stack trace)"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code_of(error, code, line, capsys, monkeypatch) -> None:
    monkeypatch.delenv("DDPM_DEBUG", raising=False)
    assert exit_code_of(failing(error)) == code
    shown = capsys.readouterr()
    assert shown.err == line + "\n"
    assert shown.out == ""


def test_a_defect_shows_its_stack_trace_on_demand(capsys, monkeypatch) -> None:
    monkeypatch.setenv("DDPM_DEBUG", "1")
    assert exit_code_of(failing(ZeroDivisionError("oops"))) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1].startswith("error: unexpected ZeroDivisionError: oops")


def test_a_job_that_ends_well_exits_with_0_and_gets_the_arguments(monkeypatch) -> None:
    got: list[str] = []
    monkeypatch.setattr(sys, "argv", ["job", "--a", "1"])
    assert exit_code_of(got.extend) == 0
    assert got == ["--a", "1"]
    assert exit_code_of(failing(SystemExit(0))) == 0
    assert exit_code_of(failing(SystemExit(None))) == 0
    assert exit_code_of(failing(SystemExit(2))) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_interrupts_lets_the_job_clean_up_and_is_not_disturbed_by_a_second(number, code, capsys) -> None:
    cleaned = []

    def main(argv: Sequence[str]) -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(30)
            pytest.fail("the signal did not interrupt the job")
        finally:
            os.kill(os.getpid(), number)
            cleaned.append(True)

    assert exit_code_of(main) == code
    assert cleaned == [True]
    assert capsys.readouterr().err == f"interrupted by {number.name}: run the same command to continue\n"


def test_the_last_line_says_what_is_kept(capsys) -> None:
    stop = Interrupted(signal.SIGTERM)
    stop.kept = "step 40 is kept, run the same command to continue"
    assert exit_code_of(failing(stop)) == 143
    assert capsys.readouterr().err == "interrupted by SIGTERM: step 40 is kept, run the same command to continue\n"


def test_a_second_request_to_stop_is_told_from_the_same_one_sent_twice(monkeypatch) -> None:
    now, seen = [100.0], []
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def main(argv: Sequence[str]) -> None:
        seen.append(console.interrupted_again())
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # `uv run` passes on what its child has got already
            seen.append(console.interrupted_again())
            now[0] += 2
            signal.raise_signal(signal.SIGINT)
            seen.append(console.interrupted_again())

    assert exit_code_of(main) == 143
    assert seen == [False, False, True]


def test_a_third_request_to_stop_does_not_wait_for_the_cleaning_up(monkeypatch) -> None:
    now, ended = [100.0], []
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.os, "_exit", ended.append)

    def main(argv: Sequence[str]) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            for expected in ([], [130]):
                now[0] += 2
                signal.raise_signal(signal.SIGINT)
                assert ended == expected

    assert exit_code_of(main) == 143


def test_progress_in_a_log_is_a_line_every_few_percent_with_rate_and_eta(capsys) -> None:
    progress = ProgressLine("digits", 1000, "steps")
    for done in range(1, 1001):
        progress.update(done, rate=2.0, detail="loss 0.5")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert 20 <= len(lines) <= 21
    assert lines[0] == "digits 1/1,000 (0%)  ETA 8:19  2.0 steps/s loss 0.5"
    assert lines[-1] == "digits 1,000/1,000 (100%)  ETA 0:00  2.0 steps/s loss 0.5"


def test_progress_before_there_is_a_rate(capsys) -> None:
    ProgressLine("digits", 10, "steps").update(0, rate=0.0)
    assert capsys.readouterr().err == "digits 0/10 (0%)  ETA ?  0.0 steps/s\n"


def test_less_than_one_a_second_is_shown_as_seconds_for_each(capsys) -> None:
    ProgressLine("photos", 60, "steps").update(40, 0.1, "loss 0.5")
    assert capsys.readouterr().err == "photos 40/60 (67%)  ETA 3:20  10.0 s/step loss 0.5\n"


def test_summary_is_aligned_on_stdout(capsys) -> None:
    summary("digits: done", [("model", "a"), ("bits/dim", "b")])
    assert capsys.readouterr().out == "\ndigits: done\n  model     a\n  bits/dim  b\n"


def test_long_lines_are_not_broken(capsys) -> None:
    event("x" * 500)
    assert capsys.readouterr().err == "x" * 500 + "\n"


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.9, 60, 3599, 3600, 90061)] == [
        "0:00",
        "0:59",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_the_terminal_cannot_encode_is_escaped(encoding: str) -> None:
    program = """
from pipelines.cli.console import event, run_job, summary

def main(argv):
    event("reading 日本語")
    summary("± σ²", [("classes", "日本語")])

run_job(main)
"""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "reading 日本語\n".encode(encoding, "backslashreplace")
    assert ended.stdout == "\n± σ²\n  classes  日本語\n".encode(encoding, "backslashreplace")


@pytest.mark.parametrize("command", ["jobs/sample.py", "-mpipelines.tracking.tracker"])
def test_help_is_shown_on_a_terminal_without_greek(command: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(
        [sys.executable, command, "--help"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.isascii()
    assert "usage" in shown.stdout


def test_a_wait_is_told_of_again_and_again_until_it_ends(monkeypatch) -> None:
    said: list[str] = []
    enough = threading.Event()

    def hear(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            enough.set()

    monkeypatch.setattr("pipelines.cli.console.event", hear)
    monkeypatch.setattr("pipelines.cli.console.HEARTBEAT_S", 0.01)
    with waiting("starting 2 workers", at_once=True):
        assert said[0] == "starting 2 workers"
        assert enough.wait(30)
    heard = len(said)
    assert set(said[1:]) == {"starting 2 workers: 0 s so far"}
    assert not [thread for thread in threading.enumerate() if thread.name == "waiting"]
    assert len(said) == heard


def test_what_takes_less_than_a_second_is_not_told_of(capsys) -> None:
    with waiting("opening"):
        pass
    assert capsys.readouterr().err == ""


def test_a_progress_line_waits_for_its_first_rate(capsys) -> None:
    line = ProgressLine("samples", 4, "images", first="starting the workers")
    line.update(0, rate=0.0)
    assert capsys.readouterr().err == ""
    line.update(2, rate=1.0)
    line.close()
    assert capsys.readouterr().err == "samples 2/4 (50%)  ETA 0:02  1.0 images/s\n"


def test_a_wait_is_seen_while_another_library_is_kept_quiet(capfd) -> None:
    with _silence(), waiting("starting a local Ray", at_once=True):
        os.write(2, b"chatter of a library\n")
    assert capfd.readouterr().err == "starting a local Ray\n"


@pytest.mark.parametrize("job", ["ingest", "train", "sample", "encode", "evaluate", "verify"])
def test_help_loads_nothing_heavy(job: str) -> None:
    program = f"""
import runpy, sys
sys.argv = ["jobs/{job}.py", "--help"]
try:
    runpy.run_path("jobs/{job}.py")["main"](sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
print("loaded:", *sorted({{"torch", "ray", "mlflow", "sklearn", "scipy", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_a_training_is_checked_before_torch_ray_or_mlflow_are_loaded() -> None:
    """So that a finished or refused one is told of at once."""
    program = """
import sys, pipelines.training.driver
print("loaded:", *sorted({"torch", "ray", "mlflow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "loaded:\n"
