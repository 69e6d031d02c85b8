"""A bad input, and what a job makes of it: its own script in a process of its own, with little memory and time."""

import gc
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import runpy
import signal
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# What a refusal may take: beyond what the imported libraries hold, and in seconds on a busy machine.
MEMORY_BYTES = 2**30
SECONDS = 60
COMMANDS = {
    **{
        f"{job}.py": f"jobs/{job}.py"
        for job in ("ingest", "train", "sample", "encode", "evaluate", "quality", "verify")
    },
    "ledger": "pipelines.training.ledger_report",
    "tracker": "pipelines.tracking.tracker",
}
# Starting a process looks for exit codes of others too, and of two threads that read one only one gets it.
_REAPING = threading.Lock()
# Imported once by the process that the jobs' processes are forked from.
_PRELOADED = [
    "__main__",
    "bad_inputs.harness",
    "mlflow.artifacts",
    "pipelines.training.ledger_report",
    "pipelines.encoding.job",
    "pipelines.evaluation.job",
    "pipelines.quality.job",
    "pipelines.sampling.job",
    "pipelines.tracking.tracker",
    "pipelines.training.driver",
    "pipelines.verify.job",
]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        area: What kind of input it is.
        name: What is bad about it.
        build: Makes it in an empty directory, the job's working directory, and returns the command line.
        says: Texts that the one line of the refusal must have: field or file, value, rule, fix.
        code: The job's exit code.
        prints: Whether the job prints its summary all the same, as `verify.py` does.
        leaves: Patterns of the paths that the job may add or change: what an unfinished output is made of.
    """

    area: str
    name: str
    build: Callable[[Path], list[str]]
    says: tuple[str, ...]
    code: int = 1
    leaves: tuple[str, ...] = ()
    prints: bool = False

    def litter(self, outcome: "Outcome") -> list[str]:
        """What the job changed and may not have."""
        return [path for path in outcome.changed if not any(fnmatch(path, pattern) for pattern in self.leaves)]


@dataclass(frozen=True)
class Outcome:
    """What the job did: exit code (negative: the signal that ended it), output, and the paths added, changed, lost."""

    code: int
    stdout: str
    stderr: str
    changed: tuple[str, ...]

    @property
    def message(self) -> str:
        """The line of the refusal, without its marker."""
        return self.stderr.removesuffix("\n").rpartition("\n")[2].removeprefix("error: ")


def run(case: Case, directory: Path) -> Outcome:
    """Build the input in `directory` (empty) and run the job on it."""
    work, logs = directory / "work", directory / "logs"
    work.mkdir()
    logs.mkdir()
    command, *argv = case.build(work)
    before = _tree(work)
    process = _context().Process(target=_run_command, args=(command, argv, work, logs))
    with _REAPING:
        process.start()
    if not multiprocessing.connection.wait([process.sentinel], SECONDS):
        process.kill()
        multiprocessing.connection.wait([process.sentinel])
    with _REAPING:
        process.join()
    assert process.exitcode is not None
    after = _tree(work)
    changed = tuple(sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path)))
    stdout, stderr = ((logs / name).read_bytes().decode() for name in ("stdout", "stderr"))
    return Outcome(process.exitcode, stdout, stderr.replace(f"{work}/", ""), changed)


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # The server imports by the interpreter's own path; it starts at the first use and keeps this environment.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return context


def _run_command(command: str, argv: list[str], work: Path, logs: Path) -> None:
    """In the job's process: what `python jobs/JOB.py ARGUMENTS` does in a shell in `work`."""
    gc.freeze()  # the libraries' objects are shared with the process forked from, and not to be looked through
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT), descriptor)
    for name in [*os.environ]:
        if name.startswith(("AWS_", "DDPM_", "MLFLOW_", "RAY_ADDRESS")):
            del os.environ[name]
    os.environ["HOME"] = str(work)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(work)
    limit = _data_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.argv = [command, *argv]
    target = COMMANDS[command]
    if target.endswith(".py"):
        runpy.run_path(str(REPOSITORY / target), run_name="__main__")
    else:
        sys.modules.pop(target, None)  # imported beforehand for its imports, not to be run twice
        runpy.run_module(target, run_name="__main__")


def _data_bytes() -> int:
    """Memory that this process may write to and that is its own."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmData:")).split()[1]) * 1024


def _tree(root: Path) -> dict[str, str]:
    """Every path below `root` with what is there; nothing is followed, no special file opened."""
    found = {}
    for directory, folders, files in os.walk(os.fsencode(root)):
        for name in folders + files:
            path = os.path.join(directory, name)  # noqa: PTH118  bytes: not every name is text
            mode = os.lstat(path)
            if stat.S_ISLNK(mode.st_mode):
                content = f"link to {os.readlink(path)!r}"  # noqa: PTH115
            elif stat.S_ISREG(mode.st_mode) and mode.st_size < 2**26:
                content = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
            else:
                content = f"{stat.S_IFMT(mode.st_mode)}"
                if not stat.S_ISDIR(mode.st_mode):
                    content += f" {mode.st_size} {mode.st_mtime_ns}"
            found[os.path.relpath(path, os.fsencode(root)).decode("utf-8", "backslashreplace")] = content
    return found
