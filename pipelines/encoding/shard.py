"""One shard of an encoding, as a function of the request and its index: what an actor of the encoding job does.

OUTPUT/data/part-00042.parquet   id int64, noise list<float>[C*H*W], round_trip_rms float64; where told: label int64
OUTPUT/preview/round_trip.png    the first images, decoded, and their noise, made with shard 0
OUTPUT/model/                    the model
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddpm_core.denoiser import NO_LABEL, NetworkDenoiser
from ddpm_core.images import to_model_range, to_uint8
from ddpm_core.model import Model
from ddpm_core.process.base import Process
from ddpm_core.samplers.base import OnStep, sample
from ddpm_core.samplers.encode import encode, encoding_times
from pipelines.cli.errors import ModelError
from pipelines.cluster.precision import PRECISION_OF
from pipelines.data.dataset import Int64s, PreparedDataset, UInt8s
from pipelines.encoding.request import EncodeRequest
from pipelines.models.kept import load_kept
from pipelines.outputs.pictures import grid_png
from pipelines.outputs.progress import Counted
from pipelines.outputs.shards import ShardOutput
from pipelines.storage.errors import clear_errors
from pipelines.storage.location import Location

PREVIEW = "round_trip.png"
_PREVIEW_IMAGES = 8


class Encoded(NamedTuple):
    """Images by row: `noise` float32 [n, C, H, W]; `decoded` float32 [n, C, H, W], what the noise leads back to, in
    model range; `round_trip_rms` float64 [n], of its difference from the image over all pixels and channels, in grey
    levels."""

    noise: Tensor
    decoded: Tensor
    round_trip_rms: Tensor


@dataclass(frozen=True)
class EncodeShards:
    """Computes shard `index`: the images of rows index*shard_size ... of the data set.

    Attributes:
        location: The output; its model/ is the model.
        request: The encoding's.
        data: The data set.
        threads: CPU threads of the network.
    """

    location: Location
    request: EncodeRequest
    data: PreparedDataset
    threads: int

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Load the model: the engine calls this once per actor."""
        torch.set_num_threads(self.threads)
        model = load_kept(self.location / "model", self.request.model_id, self.request.device)
        return lambda index: self.compute(model, index)

    def compute(self, model: Model, index: int) -> ShardOutput:
        """Encode, decode, compare."""
        request, start = self.request, index * self.request.shard_size
        stop = min(start + request.shard_size, request.num_images)
        ids, images, labels = self.data.read_images(start, stop)
        told = labels if request.labels == "given" else None
        denoiser, batches = model.denoiser.in_precision(PRECISION_OF[request.dtype]), []
        steps = len(encoding_times(denoiser.process, request.sampler)) - 1 + request.steps  # to the noise, and back
        for first in range(0, len(ids), request.batch_size):
            # Batches of one shape: the last is filled up with its last image, and what that gives is dropped.
            rows = np.minimum(np.arange(first, first + request.batch_size), len(ids) - 1)
            kept = min(request.batch_size, len(ids) - first)
            label = None if told is None else told[rows]
            found = encode_batch(request, denoiser, images[rows], label, Counted(first, kept, steps))
            batches.append([values[:kept].cpu() for values in found])
        encoded = Encoded(*map(torch.cat, zip(*batches, strict=True)))
        finite = encoded.noise.flatten(1).isfinite().all(1) & encoded.round_trip_rms.isfinite()
        if len(bad := ids[~finite.numpy()]):
            raise ModelError(
                f"model: gives no finite noise (NaN or infinite) for {len(bad)} of {len(ids)} images (first ids "
                f"{', '.join(map(str, bad[:3].tolist()))}) in {PRECISION_OF[request.dtype]}; "
                "take precision fp32, more steps, or another model"
            )
        if index == 0:
            png = preview_png(images, encoded, model.denoiser.process)
            (self.location / "preview" / PREVIEW).write_bytes(png)
        return ShardOutput(_parquet(ids, encoded, told), len(ids), {"first_id": start})


def encode_batch(
    request: EncodeRequest, denoiser: NetworkDenoiser, images: UInt8s, labels: Int64s | None, on_step: OnStep
) -> Encoded:
    """Images uint8 [B, H, W, C] with their labels int64 [B] (-1: none), if the model is told them; `on_step` is called
    with the steps of both ways."""
    device = denoiser.device
    label = None if labels is None else torch.from_numpy(labels).to(device)
    with torch.inference_mode():
        x_0 = to_model_range(torch.from_numpy(images)).contiguous().to(device)
        noise = encode(denoiser, request.sampler, x_0, request.clip, label, on_step)
        # A sampler that draws no noise makes nothing of ids and seed.
        ids = torch.arange(len(x_0), device=device)
        decoded = sample(denoiser, request.sampler, ids, 0, request.clip, label, on_step, start=noise)
        rms = (decoded - x_0).double().square().mean((1, 2, 3)).sqrt() * 127.5
    return Encoded(noise, decoded, rms)


def preview_png(images: UInt8s, encoded: Encoded, process: Process) -> bytes:
    """The first images [n, H, W, C] above what they are decoded to, and the noise, which is divided by the deviation
    that data of variance 1 would have."""
    noise = encoded.noise[:_PREVIEW_IMAGES] / process.prior_variance**0.5
    decoded = encoded.decoded[:_PREVIEW_IMAGES]
    rows = [images[:_PREVIEW_IMAGES], to_uint8(decoded).numpy(), to_uint8(noise).numpy()]
    return grid_png(np.concatenate(rows), len(rows[0]), min_side=768, row_names=["image", "decoded", "noise"])


def _parquet(ids: Int64s, encoded: Encoded, labels: Int64s | None) -> bytes:
    """Equal input gives equal bytes."""
    _, *shape = encoded.noise.shape
    values = pa.array(encoded.noise.contiguous().numpy().reshape(-1))
    noise = pa.FixedSizeListArray.from_arrays(values, int(np.prod(shape)))
    columns: dict[str, Any] = {"id": ids, "noise": noise, "round_trip_rms": encoded.round_trip_rms.numpy()}
    if labels is not None:
        columns["label"] = pa.array(labels, mask=labels == NO_LABEL)
    table = pa.table(columns)
    place = table.schema.get_field_index("noise")
    field = table.schema.field(place).with_metadata({"shape": json.dumps(shape)})
    sink = io.BytesIO()
    # Noise does not compress.
    pq.write_table(table.cast(table.schema.set(place, field)), sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def read_round_trips(shards: Location, names: Sequence[str]) -> npt.NDArray[np.float64]:
    """The column `round_trip_rms` of some shards, [n]; no noise is read."""
    found = []
    for name in names:
        path = shards / name
        with clear_errors("read", path.uri), path.open("rb") as file:
            table = pq.read_table(file, columns=["round_trip_rms"], use_threads=False)
        found.append(table["round_trip_rms"].to_numpy())
    return np.concatenate(found)
