"""What faulty requests cost: each job with a healthy store, and with one that fails a fifth of the requests.

    uv run benchmarks/faults.py [--rounds 2] [--jobs train sample]

The jobs are those of tests/chaos: data and results in SeaweedFS, on a Ray cluster of three nodes on this machine. A
ratio is wall-clock time of whole jobs, start included.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chaos import jobs
from chaos.world import World
from support.fault_proxy import FAULTS, mixed

PARTS = {"ingest": 40, "train": 20, "sample": 60, "evaluate": 60}


def main() -> None:
    """Run the jobs in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), seed=1)
        try:
            store = jobs.Store(world)
            for name in args.jobs:
                job: jobs.ChaosJob = getattr(jobs, name)(world, store, PARTS[name])
                world.run(*job.command(f"{name}-warm"))
                ratios, met = [], Counter[str]()
                for number in range(args.rounds):
                    seconds = {}
                    for kind, rules in (("healthy", []), ("faulty", mixed(0.2))):
                        world.proxy.set_rules(rules)
                        before, start = world.proxy.counts(), time.perf_counter()
                        world.run(*job.command(f"{name}-{kind}-{number}"))
                        seconds[kind] = time.perf_counter() - start
                    met += world.proxy.counts() - before
                    ratios.append(seconds["faulty"] / seconds["healthy"])
                world.proxy.set_rules([])
                shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
                faults = ", ".join(f"{met[fault]} {fault}" for fault in FAULTS if met[fault])
                print(f"{name}: faulty / healthy {statistics.median(ratios):.2f} x ({shown})")
                print(f"    {met['requests']} requests of the faulty runs, among them {faults}", flush=True)
        finally:
            world.close()


if __name__ == "__main__":
    main()
