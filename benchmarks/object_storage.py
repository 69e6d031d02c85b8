"""Training with its data in an object store beside training with its data on the local disk.

    uv run benchmarks/object_storage.py [--steps 400] [--rounds 3]

The store is SeaweedFS on loopback, the data have Fashion-MNIST's size (60,000 images of 28 x 28), the network is
that of configs/fashion_mnist.yaml. The jobs take turns, the other one first in every second round; a ratio is of
neighbours.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from job import JobSpeed, job_speed
from random_data import make_data
from support.s3_store import S3Store

from ddpm_core.config import UNetConfig
from pipelines.storage.location import Location

NETWORK = UNetConfig(28, 1, 32, (1, 2, 2), 1, (7,), dropout=0.0, num_groups=8)


def main() -> None:
    """Run the jobs in turns and print their rates, waits and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps of 64 images per job")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = S3Store(Path(directory) / "store")
        try:
            os.environ.update(store.environment)
            local = make_data(Path(directory) / "data", 60_000, (28, 28, 1)).location
            remote = Location.parse(f"s3://{store.bucket}/data")
            remote.upload_directory(local.path)
            speeds: dict[str, list[JobSpeed]] = {"local disk": [], "SeaweedFS": []}
            places = list(zip(speeds, (local, remote), strict=True))
            for number in range(args.rounds):
                for place, data in places[:: -1 if number % 2 else 1]:
                    speeds[place].append(job_speed(data.uri, NETWORK, 64, args.steps, "bf16"))
        finally:
            store.close()
    for place, measured in speeds.items():
        rates = [speed.images_per_second for speed in measured]
        wait = statistics.median(speed.wait_per_step for speed in measured)
        shown = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"{place:11} {statistics.median(rates):7.1f} images/s ({shown})")
        print(f"{'':11} {1000 * wait:7.2f} ms of a step waiting for its data")
    ratios = [b.images_per_second / a.images_per_second for a, b in zip(*speeds.values(), strict=True)]
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"SeaweedFS / local disk: {statistics.median(ratios):.3f} x ({shown})")


if __name__ == "__main__":
    main()
