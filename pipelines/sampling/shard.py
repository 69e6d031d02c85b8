"""One shard of a sample set, as a function of the request and its index: what an actor of the sampling job does.

OUTPUT/data/part-00042.parquet   id int64, image struct{bytes: PNG, path}; with labels: label int64, label_name
OUTPUT/data/part-00042.tar       or: 000000042.png, ... (WebDataset); with labels, beside each: .cls, .json
OUTPUT/preview/trajectory.png    the first images on their way from noise, made with shard 0
OUTPUT/preview/interpolation.png images between two ids, if that is asked for, made with shard 0
OUTPUT/model/                    the model that made them
OUTPUT/guidance_model/           the weaker one that guided it
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ddpm_core.denoiser import NO_LABEL, Denoiser
from ddpm_core.guidance import Guided
from ddpm_core.images import to_uint8
from ddpm_core.model import Model
from ddpm_core.process.base import Process
from ddpm_core.samplers.base import OnStep, Sampler, sample
from ddpm_core.samplers.start import slerp, starting_noise
from pipelines.cluster.precision import PRECISION_OF
from pipelines.data.dataset import Int64s, PreparedDataset
from pipelines.data.ingest.formats_tar import LABEL_NAMES
from pipelines.models.kept import load_kept
from pipelines.outputs.pictures import encode_png, grid_png, to_picture
from pipelines.outputs.progress import Counted
from pipelines.outputs.shards import ShardOutput
from pipelines.sampling.labels import SampleLabels
from pipelines.sampling.request import SampleRequest
from pipelines.storage.location import Location

GUIDANCE_MODEL = "guidance_model"
SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
# The picture of the first images' way from noise: x_t above, the predicted x_0 below.
_TRAJECTORY_IMAGES, _TRAJECTORY_STEPS = 4, 12
_INTERPOLATED = 12


@dataclass(frozen=True)
class Source:
    """What an actor samples from: the model, the weaker one that guides it, and the labels of all images, if any."""

    model: Model
    weaker: Model | None = None
    labels: SampleLabels | None = None


@dataclass(frozen=True)
class SampleShards:
    """Computes shard `index`: images index*shard_size ... of the request.

    Attributes:
        location: The output; its model/ is the model, its guidance_model/ the weaker one.
        request: The sample set's.
        threads: CPU threads of the network.
        data: The data set whose rows have the labels, if it is asked for.
    """

    location: Location
    request: SampleRequest
    threads: int
    data: PreparedDataset | None = None

    def __call__(self) -> Callable[[int], ShardOutput]:
        """Load the models and labels: the engine calls this once per actor."""
        torch.set_num_threads(self.threads)
        request, weaker = self.request, None
        model = load_kept(self.location / "model", request.model_id, request.device)
        if request.guidance_model_id is not None:
            weaker = load_kept(self.location / GUIDANCE_MODEL, request.guidance_model_id, request.device)
        labels = request.labels(None if self.data is None else self.data.read_labels())
        source = Source(model, weaker, labels)
        return lambda index: self.compute(source, index)

    def compute(self, source: Source, index: int) -> ShardOutput:
        """Sample, encode. The network sees batches of one shape at fixed ids; what is beyond the last is dropped."""
        start = index * self.request.shard_size
        stop = min(start + self.request.shard_size, self.request.num_images)
        process = source.model.denoiser.process
        trajectory = Trajectory(self.request.sampler, process) if start == 0 else None
        pngs: list[bytes] = []
        for first in range(start, stop, self.request.batch_size):
            ids = torch.arange(first, first + self.request.batch_size)
            watching = trajectory if first == 0 else None
            counted = Counted(first - start, min(stop - first, len(ids)), self.request.steps, watching)
            images = sample_batch(self.request, source, ids, counted)
            pngs += [encode_png(to_picture(image)) for image in images[: stop - first]]
        if trajectory is not None:
            (self.location / "preview" / "trajectory.png").write_bytes(trajectory.png(stop))
        if start == 0 and self.request.interpolate is not None:
            (self.location / "preview" / "interpolation.png").write_bytes(interpolated(self.request, source))
        encode = encode_parquet if self.request.format == "parquet" else encode_tar
        labels = None
        if source.labels is not None:
            labels = RowLabels(source.labels.of(np.arange(start, stop)), source.model.label_names)
        return ShardOutput(encode(start, pngs, labels), len(pngs), {"first_id": start})


def denoiser_of(request: SampleRequest, model: Model, weaker: Model | None) -> Denoiser:
    """What the sampler calls: the model in the request's precision, guided where that is asked for."""
    denoiser = model.denoiser.in_precision(PRECISION_OF[request.dtype])
    if request.guidance_scale is None:
        return denoiser
    other = weaker.denoiser.in_precision(PRECISION_OF[request.dtype]) if weaker else None
    return Guided(denoiser, request.guidance_scale, request.interval, other)


def draw(
    request: SampleRequest, source: Source, ids: Tensor, on_step: OnStep | None = None, start: Tensor | None = None
) -> Tensor:
    """The images float32 [B, C, H, W] in model range of `ids` int64 [B] by the request's sampler, on the model's
    device; `on_step` and `start` as `ddpm_core.samplers.base.sample` has them."""
    denoiser, device = denoiser_of(request, source.model, source.weaker), source.model.denoiser.device
    label = None if source.labels is None else torch.from_numpy(source.labels.of(ids.numpy())).to(device)
    with torch.inference_mode():
        ids = ids.to(device)
        return sample(denoiser, request.sampler, ids, request.seed, request.clip, label, on_step, start)


def sample_batch(
    request: SampleRequest, source: Source, ids: Tensor, on_step: OnStep | None = None
) -> npt.NDArray[np.uint8]:
    """The same as images uint8 [B, H, W, C]."""
    images: npt.NDArray[np.uint8] = to_uint8(draw(request, source, ids, on_step)).cpu().numpy()
    return images


def interpolated(request: SampleRequest, source: Source) -> bytes:
    """A PNG of one row: from the image of the first of `request.interpolate` to that of the second, with the first's
    label."""
    assert request.interpolate is not None
    ids, denoiser = torch.tensor(request.interpolate), source.model.denoiser
    noise = starting_noise(denoiser, ids.to(denoiser.device), request.seed)
    path = slerp(noise[:1], noise[1:], torch.linspace(0.0, 1.0, _INTERPOLATED, device=denoiser.device))
    images = draw(request, source, ids[:1].expand(_INTERPOLATED), start=path)
    return grid_png(to_uint8(images).cpu().numpy(), columns=_INTERPOLATED, min_side=768)


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


class RowLabels(NamedTuple):
    """The labels int64 [n] of a shard's rows (-1: none), and what the K classes are called."""

    labels: Int64s
    names: Sequence[str]

    def name(self, row: int) -> str | None:
        """Of a row's class."""
        return self.names[self.labels[row]] if self.labels[row] != NO_LABEL else None


class SampleRow(NamedTuple):
    """An image of a shard; its label is -1 where it has none."""

    id: int
    png: bytes
    label: int = NO_LABEL


def encode_parquet(first_id: int, pngs: list[bytes], labels: RowLabels | None = None) -> bytes:
    """A Parquet file that Hugging Face `datasets` and pandas show as images; equal input gives equal bytes."""
    ids = np.arange(first_id, first_id + len(pngs), dtype=np.int64)
    paths = [_file_name(first_id + offset) for offset in range(len(pngs))]
    images = pa.StructArray.from_arrays([pa.array(pngs, pa.binary()), pa.array(paths)], ["bytes", "path"])
    columns: dict[str, pa.Array] = {"id": pa.array(ids), "image": images}
    features: dict[str, object] = {"id": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}}
    compression = {"id": "zstd", "image.bytes": "none", "image.path": "zstd"}
    if labels is not None:
        columns["label"] = pa.array(labels.labels, mask=labels.labels == NO_LABEL)
        columns["label_name"] = pa.array([labels.name(row) for row in range(len(pngs))], pa.string())
        features["label"] = {"names": list(labels.names), "_type": "ClassLabel"}
        features["label_name"] = {"dtype": "string", "_type": "Value"}
        compression |= {"label": "zstd", "label_name": "zstd"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, use_dictionary=False, row_group_size=256)
    return sink.getvalue()


def encode_tar(first_id: int, pngs: list[bytes], labels: RowLabels | None = None) -> bytes:
    """A WebDataset shard; equal input gives equal bytes (no times, no owners).

    With labels, KEY.cls is an image's class as a number (-1: none), KEY.json is {"label": ..., "label_name": ...}, null
    where there is none, and the tar file's global header has the names of all classes.
    """
    sink = io.BytesIO()
    kind, header = tarfile.USTAR_FORMAT, None
    if labels is not None:
        kind, header = tarfile.PAX_FORMAT, {LABEL_NAMES: json.dumps(list(labels.names))}
    with tarfile.open(fileobj=sink, mode="w", format=kind, pax_headers=header) as archive:
        for offset, png in enumerate(pngs):
            name = _file_name(first_id + offset)
            files = {name: png}
            if labels is not None:
                label = int(labels.labels[offset])
                told = {"label": None if label == NO_LABEL else label, "label_name": labels.name(offset)}
                files[name.replace(".png", ".cls")] = str(label).encode()
                files[name.replace(".png", ".json")] = json.dumps(told).encode()
            for member, content in files.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def decode_rows(content: bytes, kind: str) -> Iterator[SampleRow]:
    """Every image of a shard of format `kind`, in order."""
    if kind == "parquet":
        for batch in pq.ParquetFile(io.BytesIO(content)).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                label = row.get("label")
                yield SampleRow(row["id"], row["image"]["bytes"], NO_LABEL if label is None else label)
        return
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        last: SampleRow | None = None
        for entry in archive:
            member = archive.extractfile(entry)
            data = member.read() if member else b""
            if entry.name.endswith(".png"):
                if last is not None:
                    yield last
                last = SampleRow(int(entry.name.removesuffix(".png")), data)
            elif last is not None and entry.name == _file_name(last.id).replace(".png", ".cls"):
                last = last._replace(label=int(data))
        if last is not None:
            yield last


def decode_shard(content: bytes, kind: str) -> Iterator[tuple[int, bytes]]:
    """(id, PNG bytes) of every image of a shard of format `kind`, in order."""
    return ((row.id, row.png) for row in decode_rows(content, kind))


def _file_name(index: int) -> str:
    return f"{index:012d}.png"
