"""A sequence of faults, the same for the same seed, and a job that has to live through it."""

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos.world import World
from support.job_process import JobProcess, until

KINDS = {
    "worker": "worker process killed (`kill -9`)",
    "node": "node killed (its raylet and all its processes), another one joins",
    "driver": "driver killed (`kill -9`), the same command again",
    "store": "object store killed (`kill -9`), back after 2 to 8 s",
    "requests": "a fifth of the S3 requests fail for 10 to 20 s (503, 500, resets, truncated, lost acknowledgements)",
    "mlflow": "MLflow server killed, back after a minute",
    "disk": "disk full, freed after 10 s or when the job gives up",
}
_LOST = "Rows, shards, steps or metrics lost, doubled, half-written or different"


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, the part of the work done at which it comes, and a number in [0, 1) for its details."""

    kind: str
    at: float
    choice: float


def sequence(seed: str, count: int) -> list[Fault]:
    """`count` faults in order, spread over the job, every kind as often as any other (give or take one).

    The last one comes while a twentieth is to be done, and two parts of a job in 2 (count + 1) parts.
    """
    last = min(0.95, count / (count + 1))
    chance = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += chance.sample(sorted(KINDS), len(KINDS))
    return [Fault(kinds[n], (n + chance.random()) / count * last, chance.random()) for n in range(count)]


@dataclass
class Outcome:
    """What a job lived through: faults by kind, starts of its driver, seconds, and all that it printed."""

    faults: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    seconds: float = 0.0
    text: str = ""


def live_through(
    faults: list[Fault], world: World, command: list[str], progress: Callable[[], float], timeout_s: float
) -> Outcome:
    """Run `command` to its end while `faults` happen to it, each as soon as `progress` (0..1) has reached its place.

    Whoever looks after the job does what its last line says: the same command again, after a driver that was killed
    and after a full disk was freed. Nothing else may end it.
    """
    outcome, left, began, given_up = Outcome(), list(faults), time.monotonic(), 0
    while True:
        job = JobProcess(*command, environment=world.environment)
        outcome.attempts += 1
        killed = False

        def strike(job: JobProcess = job) -> bool:
            nonlocal killed
            world.heal()
            while left and not killed and progress() >= left[0].at:
                if not _inject(left[0], world, job):
                    break
                fault = left.pop(0)
                outcome.faults[fault.kind] += 1
                killed = fault.kind == "driver"
            return not job.running

        try:
            until(strike, timeout_s, told=lambda job=job: f"{left}\n{job.text}")
            code = job.wait()
        finally:
            job.close()
        outcome.text += job.text
        if code == 0:
            break
        full = code == 1 and "the disk is full" in job.text.splitlines()[-1]
        given_up += full
        expected = (killed and code == -signal.SIGKILL) or (full and given_up <= outcome.faults["disk"])
        assert expected, f"exit code {code}:\n{job.text}"
        if full:
            world.heal(now=True)
    outcome.seconds = time.monotonic() - began
    world.heal(now=True)
    assert not left, f"the job was done before {left}:\n{outcome.text}"
    if waiting := re.search(r"records are not in MLflow yet and wait in (\S+?);", job.text):
        world.run("-m", "pipelines.tracking.tracker", waiting[1])
    return outcome


def _inject(fault: Fault, world: World, job: JobProcess) -> bool:
    """Let it happen; False when there is nothing yet that it could happen to."""
    if fault.kind == "worker":
        return world.kill_worker(fault.choice)
    if fault.kind == "node":
        world.kill_node(fault.choice)
    elif fault.kind == "driver":
        job.send(signal.SIGKILL)
    elif fault.kind == "store":
        world.kill_store(2 + 6 * fault.choice)
    elif fault.kind == "requests":
        world.spoil_requests(10 + 10 * fault.choice)
    elif fault.kind == "mlflow":
        world.stop_mlflow(60)
    else:
        world.fill_disk(10)
    return True


def write_table(path: Path, outcomes: dict[str, Outcome], seed: int) -> None:
    """Renew, in the table between its two marks in a Markdown file, the columns of these jobs."""
    before, mark, rest = path.read_text().partition("<!-- faults -->\n")
    table, end, after = rest.partition("<!-- end of faults -->")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    columns = {job: [row[place] for row in rows] for place, job in enumerate(header) if place}
    for job, outcome in outcomes.items():
        numbers = [*(outcome.faults[kind] for kind in KINDS), outcome.faults.total(), outcome.attempts]
        # What the test has compared: it fails before this where there is a difference.
        columns[job] = [*map(str, numbers), "0", f"{outcome.seconds / 60:.0f} min", str(seed)]
    names = [*KINDS.values(), "Faults in all", "Starts of the driver", _LOST, "Time", "Seed"]
    lines = [["Fault", *columns], ["---", *("---:" for _ in columns)]]
    lines += [[name, *(columns[job][place] for job in columns)] for place, name in enumerate(names)]
    path.write_text(before + mark + "".join(f"| {' | '.join(line)} |\n" for line in lines) + end + after)
