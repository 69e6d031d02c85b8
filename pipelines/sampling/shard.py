"""One shard of a sample set, as a function of the request and its index: what an actor of the sampling job does.

OUTPUT/data/part-00042.parquet   id int64, image struct{bytes: PNG, path}
OUTPUT/data/part-00042.tar       or: 000000042.png, ... (WebDataset)
OUTPUT/preview/trajectory.png    the first images on their way from noise, made with shard 0
OUTPUT/model/                    the model that made them
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddpm_core.images import to_uint8
from ddpm_core.model import Model
from ddpm_core.process.base import Process
from ddpm_core.samplers.base import OnStep, Sampler, sample
from pipelines.cluster.precision import PRECISION_OF
from pipelines.models.kept import load_kept
from pipelines.outputs.pictures import encode_png, grid_png, to_picture
from pipelines.outputs.progress import made
from pipelines.outputs.shards import ShardOutput
from pipelines.sampling.request import SampleRequest
from pipelines.storage.location import Location

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
# The picture of the first images' way from noise: x_t above, the predicted x_0 below.
_TRAJECTORY_IMAGES, _TRAJECTORY_STEPS = 4, 12


@dataclass(frozen=True)
class SampleShards:
    """Computes shard `index`: images index*shard_size ... of the request.

    Attributes:
        location: The output; its model/ is the model.
        request: The sample set's.
        threads: CPU threads of the network.
    """

    location: Location
    request: SampleRequest
    threads: int

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Load the model: the engine calls this once per actor."""
        torch.set_num_threads(self.threads)
        model = load_kept(self.location / "model", self.request.model_id, self.request.device)
        return lambda index: self.compute(model, index)

    def compute(self, model: Model, index: int) -> ShardOutput:
        """Sample, encode. The network sees batches of one shape at fixed ids; what is beyond the last is dropped."""
        start = index * self.request.shard_size
        stop = min(start + self.request.shard_size, self.request.num_images)
        trajectory = Trajectory(self.request.sampler, model.denoiser.process) if start == 0 else None
        pngs: list[bytes] = []
        for first in range(start, stop, self.request.batch_size):
            ids = torch.arange(first, first + self.request.batch_size)
            counted = _Counted(first - start, min(stop - first, len(ids)), self.request.steps)
            images = sample_batch(self.request, model, ids, counted.watching(trajectory if first == 0 else None))
            pngs += [encode_png(to_picture(image)) for image in images[: stop - first]]
        if trajectory is not None:
            (self.location / "preview" / "trajectory.png").write_bytes(trajectory.png(stop))
        encode = encode_parquet if self.request.format == "parquet" else encode_tar
        return ShardOutput(encode(start, pngs), len(pngs), {"first_id": start})


def sample_batch(
    request: SampleRequest, model: Model, ids: Tensor, on_step: OnStep | None = None
) -> npt.NDArray[np.uint8]:
    """The images uint8 [B, H, W, C] of `ids` int64 [B] by the request's sampler, on the model's device."""
    denoiser = model.denoiser.in_precision(PRECISION_OF[request.dtype])
    ids = ids.to(denoiser.device)
    with torch.inference_mode():
        x = sample(denoiser, request.sampler, ids, request.seed, request.clip_x_0, on_step=on_step)
    images: npt.NDArray[np.uint8] = to_uint8(x).cpu().numpy()
    return images


@dataclass
class _Counted:
    """Tells with every step of the sampler how many images of the shard are made: `before` the batch, and its share."""

    before: int
    images: int
    steps: int
    done: int = 0

    def watching(self, other: OnStep | None) -> OnStep:
        """The sampler's `on_step`; calls `other` too."""

        def on_step(k: int, z_t: Tensor, x_0_pred: Tensor) -> None:
            if other is not None:
                other(k, z_t, x_0_pred)
            self.done += 1
            made(self.before + self.images * self.done / self.steps)

        return on_step


class Trajectory:
    """Watches a sampler and keeps some steps of its first images.

    z_t is divided by the deviation that data of variance 1 would have, 1 of a variance-preserving process, so that the
    noise of one whose variance explodes can be seen, too.
    """

    def __init__(self, sampler: Sampler, process: Process) -> None:
        now = process.at(sampler.times(process))
        self._deviations = (now.alpha.square() + now.sigma.square()).sqrt().flatten().tolist()
        num_steps = len(self._deviations)
        chosen = np.linspace(0, num_steps - 1, min(_TRAJECTORY_STEPS, num_steps)).round().astype(int)
        self._steps = set((num_steps - 1 - chosen).tolist())
        self._kept: list[Tensor] = []

    def __call__(self, k: int, z_t: Tensor, x_0_pred: Tensor) -> None:
        """Take a step's input and prediction, [B, C, H, W] in model range."""
        if k in self._steps:
            shown = z_t[:_TRAJECTORY_IMAGES] / self._deviations[k]
            pair = torch.stack([shown, x_0_pred[:_TRAJECTORY_IMAGES]], dim=1)
            self._kept.append(pair.cpu())

    def png(self, num_images: int) -> bytes:
        """Two rows for each image, x_t above the predicted x_0; time runs from noise on the left."""
        rows = torch.stack(self._kept, dim=2)[:num_images]  # [n, 2, steps, C, H, W]
        return grid_png(to_uint8(rows.flatten(0, 2)).numpy(), columns=rows.shape[2], min_side=768)


def encode_parquet(first_id: int, pngs: list[bytes]) -> bytes:
    """A Parquet file that Hugging Face `datasets` and pandas show as images; equal input gives equal bytes."""
    ids = np.arange(first_id, first_id + len(pngs), dtype=np.int64)
    paths = [_file_name(first_id + offset) for offset in range(len(pngs))]
    images = pa.StructArray.from_arrays([pa.array(pngs, pa.binary()), pa.array(paths)], ["bytes", "path"])
    features = {"id": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"id": pa.array(ids), "image": images}).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    compression = {"id": "zstd", "image.bytes": "none", "image.path": "zstd"}
    pq.write_table(table, sink, compression=compression, use_dictionary=False, row_group_size=256)
    return sink.getvalue()


def encode_tar(first_id: int, pngs: list[bytes]) -> bytes:
    """A WebDataset shard; equal input gives equal bytes (no times, no owners)."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for offset, png in enumerate(pngs):
            entry = tarfile.TarInfo(_file_name(first_id + offset))
            entry.size = len(png)
            archive.addfile(entry, io.BytesIO(png))
    return sink.getvalue()


def decode_shard(content: bytes, kind: str) -> Iterator[tuple[int, bytes]]:
    """(id, PNG bytes) of every image of a shard of format `kind`, in order."""
    if kind == "parquet":
        for batch in pq.ParquetFile(io.BytesIO(content)).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield row["id"], row["image"]["bytes"]
        return
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for entry in archive:
            member = archive.extractfile(entry)
            yield int(entry.name.removesuffix(".png")), member.read() if member else b""


def _file_name(index: int) -> str:
    return f"{index:012d}.png"
