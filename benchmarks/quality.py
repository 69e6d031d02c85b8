"""Features/s of the quality job's shards on one worker, against a bare loop of the same extractor.

    uv run benchmarks/quality.py --features random_conv:512
    uv run benchmarks/quality.py --features random_conv --images 60000 --shape 28 28 1

Bare: the extractor on images in memory, batch by batch, features kept. Shards: reading the images, the extractor,
digests, Parquet, sha256 and records, on one worker of Ray, from its first work to the last stored shard. They take
turns, and each turn of the shards is divided by the mean of the bare turns before and after it. Compare the ratios, not
the rates.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from random_data import make_data

from pipelines.cluster import connection
from pipelines.cluster.actor_pool import ActorPool
from pipelines.data.dataset import PreparedDataset
from pipelines.outputs.shards import Progress
from pipelines.quality.extractors.asked import extractor_asked
from pipelines.quality.extractors.asking import Asked
from pipelines.quality.extractors.config import OnnxConfig
from pipelines.quality.extractors.load import load_extractor
from pipelines.quality.features import EXTRACTOR, FEATURES, FeatureRequest, FeatureShards
from pipelines.storage.location import Location


def bare(asked: Asked, data: PreparedDataset, args: argparse.Namespace, scratch: Path) -> float:
    """Images/s of the extractor alone."""
    asked.keep(Location.parse(scratch / EXTRACTOR))
    extract = load_extractor(asked.request, Location.parse(scratch / EXTRACTOR), args.threads, "cpu")
    _, images, _ = data.read_images(0, data.num_rows)
    whole = range(0, len(images) - args.batch + 1, args.batch)
    extract(images[: args.batch])
    start = time.perf_counter()
    found = [extract(images[first : first + args.batch]) for first in whole]
    assert np.isfinite(found[-1]).all()
    return len(whole) * args.batch / (time.perf_counter() - start)


def shards(asked: Asked, data: PreparedDataset, args: argparse.Namespace, scratch: Path) -> float:
    """Images/s of the job's shards on one worker."""
    request = FeatureRequest(data.dataset_id, data.num_rows, asked.request, args.batch, args.shard_size, "cpu")
    output = FEATURES.output(Location.parse(scratch / "features"), request)
    output.begin()
    asked.keep(output.location / EXTRACTOR)
    seen: list[Progress] = []
    factory = FeatureShards(output.location, request, data, args.threads)
    output.compute(factory, request.num_shards, pool=ActorPool(1, num_cpus=args.threads), on_progress=seen.append)
    return seen[-1].rate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="random_conv")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--shape", type=int, nargs=3, default=[28, 28, 1], help="height, width, channels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shard_size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        data = make_data(root / "data", args.images, tuple(args.shape))
        asked = extractor_asked(args.features, OnnxConfig(), data.image_shape, None, root)
        rates, ratios = [bare(asked, data, args, root / "bare")], []
        for turn in range(args.turns):
            rate = shards(asked, data, args, root / str(turn))
            rates.append(bare(asked, data, args, root / "bare"))
            ratios.append(rate / statistics.mean(rates[-2:]))
            print(f"turn {turn + 1}: bare {rates[-1]:,.0f} images/s, shards {rate:,.0f}, ratio {ratios[-1]:.3f}")
    connection.disconnect()
    print(f"{asked.request.name}: ratio {statistics.median(ratios):.3f} (median of {args.turns})")


if __name__ == "__main__":
    main()
