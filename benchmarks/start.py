"""How long a job takes until it says something, until it makes something, and in all.

    uv run benchmarks/start.py [--rounds 3] [--only sample evaluate]

Runs the jobs as a user does, each command a process of its own, with an empty home directory per round, and prints
for each aim the least, the median and the largest time (s): from the command to its first line, the longest silence
before its first step or image, to that step or image, and to its end.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A line of progress with a rate that is not 0.
PROGRESS = re.compile(r"^\S+ [\d,]+/[\d,]+ \(\d+%\)  ETA \d.* (\S+/s|s/\S+)")


@dataclass(frozen=True)
class Command:
    """A job, `{home}` standing for the round's home directory; `aim` in seconds is for `what`: first, end."""

    name: str
    job: str
    arguments: str
    what: str
    aim: float


MODEL = "--model models:/digits@champion"
SAMPLE = f"{MODEL} --num_images 64 --output {{home}}/samples --sampler.name ddim"
COMMANDS = [
    Command("help", "train", "--help", "end", 1.5),
    Command("train", "train", "--tracking.every_steps 1 --train.steps 20", "first", 25.0),
    Command("train-whole", "train", "--name whole", "end", 150.0),
    Command("sample", "sample", SAMPLE, "end", 15.0),
    Command("sample-ddpm", "sample", SAMPLE.replace("samples --sampler.name ddim", "ancestral"), "end", 15.0),
    Command("finished", "sample", SAMPLE, "end", 2.5),
    Command("dry-run", "sample", SAMPLE.replace("samples", "planned") + " --dry_run true", "end", 10.0),
    Command(
        "evaluate",
        "evaluate",
        f"{MODEL} --data embedded://digits/test --num_images 64 --output {{home}}/eval",
        "end",
        20.0,
    ),
]


@dataclass(frozen=True)
class Times:
    """Seconds from the command to its first line, first progress and end, and the longest silence before progress."""

    line: float
    silence: float
    first: float
    end: float


def run(command: Command, home: Path) -> Times:
    """Run a job in `home`; its output must be that of success."""
    argv = [sys.executable, str(ROOT / "jobs" / f"{command.job}.py"), *command.arguments.format(home=home).split()]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    }
    began = last = time.monotonic()
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**environment, "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    line = first = None
    silence, said = 0.0, []
    for text in process.stdout:
        now = time.monotonic()
        said.append(text)
        if first is None:
            silence = max(silence, now - last)
        last, line = now, line if line is not None else now - began
        if first is None and PROGRESS.match(text):
            first = now - began
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(argv)}: exit code {process.returncode}\n{''.join(said)}")
    end = time.monotonic() - began
    return Times(line or end, silence, first if first is not None else end, end)


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[command.name for command in COMMANDS])
    args = parser.parse_args()
    measured: dict[str, list[Times]] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="ddpm-start-", ignore_cleanup_errors=True) as home:
            for command in COMMANDS:
                # Without a model there is nothing to sample from.
                if args.only is None or command.name in (*args.only, "train"):
                    times = run(command, Path(home))
                    measured.setdefault(command.name, []).append(times)
                    print(f"{command.name}: {times}", file=sys.stderr, flush=True)
    print(
        "| What | Aim | First line | Longest silence before progress | First progress | End |\n"
        "|---|---|---|---|---|---|"
    )
    for command in COMMANDS:
        if runs := measured.get(command.name):
            cells = [_spread([getattr(times, name) for times in runs]) for name in ("line", "silence", "first", "end")]
            met = max(getattr(times, command.what) for times in runs) <= command.aim
            aim = f"{command.what} ≤ {command.aim:g}: {'met' if met else 'not met'}"
            print(f"| {command.name} | {aim} | {' | '.join(cells)} |")


def _spread(values: list[float]) -> str:
    return f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f}"


if __name__ == "__main__":
    main()
