"""The five jobs as the chaos suite runs them: in how many parts, how far they are, and what they leave."""

import hashlib
import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError
from chaos.world import PREFIX, World
from PIL import Image
from support.sample_runs import save_tiny_model

from ddpm_core.config import UNetConfig

# A driver of jobs/ingest.py that cuts the source into units of 21 images, so that there are many of them.
_INGEST = """
import runpy
from pipelines.data.ingest import job as ingest
ingest._UNIT_BYTES = 2**16
runpy.run_path("jobs/ingest.py", run_name="__main__")
"""
TRAIN_BATCH = 64
_DIGITS = (299, 1498)  # images of embedded://digits/test and train
_UNIT_IMAGES, _SIDE, _TAR_IMAGES = 21, 32, 100


@dataclass(frozen=True)
class ChaosJob:
    """A job cut into `parts`.

    `command(name)` is what its user runs to make the output `name`, `output(name)` where that lies, and
    `parts_done(name)` counts what of it is there.
    """

    parts: int
    command: Callable[[str], list[str]]
    output: Callable[[str], str]
    parts_done: Callable[[str], int]

    def progress(self, name: str) -> float:
        """0..1."""
        return self.parts_done(name) / self.parts


class Store:
    """What lies in the world's `bucket`, past the proxy."""

    def __init__(self, world: World) -> None:
        environment = world.store.environment
        self._bucket = world.store.bucket
        self._client = boto3.client(
            "s3",
            environment["AWS_DEFAULT_REGION"],
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        )

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{PREFIX}/{key}", Body=data)

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Content by name below a prefix."""
        return {
            key: self._client.get_object(Bucket=self._bucket, Key=f"{PREFIX}/{prefix}{key}")["Body"].read()
            for key in self.names(prefix)
        }

    def names(self, prefix: str) -> list[str]:
        """Keys below a prefix, without it; none while the store is away."""
        prefix = f"{PREFIX}/{prefix}"
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix)
            return sorted(item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", []))
        except (BotoCoreError, ClientError):
            return []


def ingest(world: World, store: Store, parts: int) -> ChaosJob:
    """From tar files in the store to the small disk; its parts are small."""
    parts *= 3
    images = _UNIT_IMAGES * parts
    _store_tars(store, images)

    def parts_done(name: str) -> int:
        return len(list((world.disk / name / "_work/records/decoded").glob("*.json")))

    options = ["--image_size", str(_SIDE), "--shard_mib", "1", "--cluster.num_workers", "2"]
    source = f"{world.bucket}/images/*.tar"
    return ChaosJob(
        parts,
        lambda name: ["-c", _INGEST, "--source", source, "--output", str(world.disk / name), *options],
        lambda name: str(world.disk / name),
        parts_done,
    )


def _store_tars(store: Store, count: int) -> None:
    """`count` pictures that take some 20 ms each to decode, in tar files."""
    chance = np.random.default_rng(0)
    pictures = []
    for _ in range(8):
        file = io.BytesIO()
        small = Image.fromarray(chance.integers(0, 256, (16, 16, 3), np.uint8))
        small.resize((1024, 1024), Image.Resampling.BICUBIC).save(file, "JPEG")
        pictures.append(file.getvalue())
    for start in range(0, count, _TAR_IMAGES):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for index in range(start, min(start + _TAR_IMAGES, count)):
                member = tarfile.TarInfo(f"{index:06d}.jpg")
                member.size = len(pictures[index % 8])
                tar.addfile(member, io.BytesIO(pictures[index % 8]))
        store.put(f"images/{start:06d}.tar", archive.getvalue())


def train(world: World, store: Store, parts: int) -> ChaosJob:
    """The digits, two workers; a part is the ten steps of a checkpoint."""
    steps = 10 * parts
    options = {
        "root": f"{world.bucket}/ddpm",
        "data.cpus_per_read": "0.25",
        "batch_size": str(TRAIN_BATCH),
        "train.steps": str(steps),
        "checkpoint.every_steps": "10",
        "validation.every_steps": str(5 * steps),
        "validation.num_images": "32",
        "grid.every_steps": str(5 * steps),
        "grid.num_images": "4",
        "cluster.num_workers": "2",
        "cluster.cpus_per_worker": "0.75",
        "cluster.threads_per_worker": "1",
        "cluster.max_failures": "100",
        "tracking.every_steps": "5",
    }

    def parts_done(name: str) -> int:
        prefix = f"ddpm/runs/{name}/checkpoints/"
        committed = [key for key in store.names(prefix) if key.endswith("/state.json")]
        return int(committed[-1].split("/")[0].removeprefix("step-")) // 10 if committed else 0

    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return ChaosJob(
        parts,
        lambda name: ["jobs/train.py", "--name", name, *flags],
        lambda name: f"{world.bucket}/ddpm/runs/{name}",
        parts_done,
    )


def sample(world: World, store: Store, parts: int) -> ChaosJob:
    """Images by ancestral sampling, from the store to the store."""
    _store_model(world, store)
    options = ["--model", f"{world.bucket}/model", "--num_images", str(64 * parts), "--shard_size", "64"]
    return _bulk(world, store, "sample", parts, options)


def evaluate(world: World, store: Store, parts: int) -> ChaosJob:
    """Bits per dimension of digits, to the store."""
    _store_model(world, store)
    options = ["--model", f"{world.bucket}/model", "--data", "embedded://digits/train", "--shard_size", "16"]
    options += ["--estimator", "all", "--num_images", str(16 * parts)]
    return _bulk(world, store, "evaluate", parts, options)


def quality(world: World, store: Store, parts: int) -> ChaosJob:
    """The digits of the one half against those of the other, their features and neighbours, to the store.

    A part is a shard of features, which the job makes first; the images are resized for these to take a while.
    """
    size = -(-sum(_DIGITS) // parts)
    options = ["--samples", "embedded://digits/test", "--reference", "embedded://digits/train", "--resize", "256"]
    options += ["--shard_size", str(size), "--block_size", str(size)]
    job = _bulk(world, store, "quality", parts, options)

    def parts_done(name: str) -> int:
        return len([key for key in store.names(f"quality/{name}/features/") if "/data/part-" in key])

    # A directory for the numbers and the features beside them.
    return ChaosJob(
        sum(-(-images // size) for images in _DIGITS),
        lambda name: [word.replace(job.output(name), f"{job.output(name)}/{name}") for word in job.command(name)],
        job.output,
        parts_done,
    )


def _bulk(world: World, store: Store, job: str, parts: int, options: list[str]) -> ChaosJob:
    options = [*options, "--cluster.num_workers", "2", "--root", str(world.disk / "home")]
    return ChaosJob(
        parts,
        lambda name: [f"jobs/{job}.py", "--output", f"{world.bucket}/{job}/{name}", *options],
        lambda name: f"{world.bucket}/{job}/{name}",
        lambda name: len([key for key in store.names(f"{job}/{name}/_work/records/") if key.endswith(".json")]),
    )


def _store_model(world: World, store: Store) -> None:
    directory = world.disk / "model"
    if not directory.exists():
        save_tiny_model(directory, network=UNetConfig(8, 1, 32, (1, 2), 2, (4,), num_heads=1, dropout=0.0))
        for file in directory.iterdir():
            store.put(f"model/{file.name}", file.read_bytes())


def contents(world: World, store: Store, output: str) -> dict[str, bytes]:
    """Everything in an output, by name; what the run of a training leaves is cut down to what two runs share."""
    if not output.startswith("s3://"):
        root = Path(output)
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    found = store.objects(output.removeprefix(f"{world.bucket}/") + "/")
    if "result.json" not in found:
        # What an output says of itself has its name; what the mirror of the spool holds is in MLflow.
        name = output.rsplit("/", 1)[1]
        return {
            key.replace(name, "NAME"): data.replace(name.encode(), b"NAME")
            if key.endswith((".html", "manifest.json"))
            else data
            for key, data in found.items()
            if "tracking" not in key.split("/")
        }
    last = max(name.split("/")[1] for name in found if name.startswith("checkpoints/"))
    kept = [f"checkpoints/{last}/", f"grids/{last}"]
    return {
        name: data
        for name, data in found.items()
        # state.json has the times of the records, the model's config.json the name of the run
        if name.startswith(tuple(kept)) and not name.endswith(".json")
    }


def digests(content: dict[str, bytes]) -> dict[str, str]:
    """sha256 by name: a difference can be read."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(content.items())}


def ids(content: dict[str, bytes]) -> list[tuple[str, int]]:
    """(directory, id) of every row of an output, in the order of its shards."""
    column: list[tuple[str, int]] = []
    for name in sorted(content):
        if shard := re.search(r"^(.*/)?(data|terms)/part-", name):
            table = pq.read_table(io.BytesIO(content[name]), columns=["id"])
            column += [(shard[1] or "", id) for id in table.column("id").to_pylist()]
    return column
