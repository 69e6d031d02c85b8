"""What planning costs for a billion images: seconds and memory until the first shard is begun.

    uv run benchmarks/plan.py [--images 1000000000] [--shard_size 4096]

A real output is begun and the shard engine is started on a running Ray with one actor; the first shard that the actor
is given ends the computation. So everything that is done before images are made is in: looking for finished shards,
listing the missing ones, handing them to Ray Data, starting the actor.
"""

import argparse
import contextlib
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipelines.cli.errors import DataError
from pipelines.cluster import connection
from pipelines.cluster.actor_pool import ActorPool
from pipelines.outputs.shards import ShardedOutput, ShardOutput
from pipelines.storage.location import Location


@dataclass(frozen=True)
class Stop:
    """Ends the computation at its first shard, and writes down when that was."""

    log: str

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Called once per actor."""

        def stop(index: int) -> ShardOutput:
            Path(self.log).write_text(f"{time.time()} {index}")
            raise DataError("planned")

        return stop


def main() -> None:
    """Plan, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10**9)
    parser.add_argument("--shard_size", type=int, default=4096)
    args = parser.parse_args()
    num_shards = -(-args.images // args.shard_size)
    connection.connect()
    import ray.data  # noqa: F401  its import is a start-up cost of any size of job

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as scratch:
        output = ShardedOutput(Location.parse(f"{scratch}/output"), {"images": args.images})
        output.begin()
        started = time.time()
        with contextlib.suppress(DataError):
            output.compute(Stop(f"{scratch}/log"), num_shards, pool=ActorPool(1))
        seconds = float((Path(scratch) / "log").read_text().split()[0]) - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    connection.disconnect()
    print(f"{args.images:,} images in {num_shards:,} shards: first shard begun after {seconds:.1f} s")
    print(f"driver's peak memory {peak:,.0f} MiB, {peak - before:,.0f} MiB of it for the plan")


if __name__ == "__main__":
    main()
