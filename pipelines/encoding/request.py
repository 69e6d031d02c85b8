"""What an encoding answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ddpm_core.model import Model
from ddpm_core.samplers.base import STATIC_CLIP, Clip, Sampler
from ddpm_core.samplers.encode import encoding_times
from pipelines.cli.config import require
from pipelines.cli.errors import ConfigError
from pipelines.cluster.precision import DTYPE_OF, Dtype
from pipelines.data.dataset import PreparedDataset
from pipelines.data.fit import are_labels_told, check_images
from pipelines.encoding.config import EncodeConfig
from pipelines.outputs.request import Request, read_fields
from pipelines.sampling.samplers import SAMPLERS, described, name_of, sampler_asked, stored_sampler
from pipelines.storage.location import Location

LabelsTold = Literal["given", "null"]


@dataclass(frozen=True)
class EncodeRequest(Request):
    """The values that determine every byte of an encoding.

    Attributes:
        model_id: Hash of the model's files.
        dataset_id: Of the images.
        num_images: Ids are 0..num_images-1.
        sampler: Stored by its name in `SAMPLERS`, its options beside it.
        steps: Of the sampler.
        clip_x_0: Whether every predicted x_0 is clamped to the range of pixels, on both ways.
        dtype: Precision of the network.
        device: What computes.
        batch_size: Images in one call of the network.
        shard_size: Images in one object.
        labels: What a model that was trained with labels is told; None of one that was not.
    """

    model_id: str
    dataset_id: str
    num_images: int
    sampler: Sampler
    steps: int
    clip_x_0: bool
    dtype: Dtype
    device: Literal["cpu", "cuda"]
    batch_size: int
    shard_size: int
    labels: LabelsTold | None = None

    @property
    def on_gpu(self) -> bool:
        """See `Request`."""
        return self.device == "cuda"

    @property
    def num_shards(self) -> int:
        """All are of `shard_size` images but the last."""
        return -(-self.num_images // self.shard_size)

    @property
    def clip(self) -> Clip | None:
        """Of both ways."""
        return STATIC_CLIP if self.clip_x_0 else None

    @property
    def described_sampler(self) -> str:
        """For a person."""
        return described(self.sampler, self.steps)

    def to_json(self) -> dict[str, Any]:
        """See `Request`."""
        name = name_of(self.sampler)
        return {**super().to_json(), "sampler": name, **SAMPLERS[name].options(self.sampler)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], path: Location) -> Self:
        """See `Request`."""
        sampler, rest = stored_sampler(stored, path)
        return read_fields(cls, rest, path, sampler=sampler)


def request_of(config: EncodeConfig, model: Model, data: PreparedDataset) -> EncodeRequest:
    """The request that a job's fields make of what they name; `precision` has been settled.

    Raises:
        ConfigError: The sampler does not fit the model; the model's SNR ends at 0, or it takes no labels; there are
            fewer images.
        DataError: The data are of another shape, range of values or labels than the model's, or have none.
    """
    channels, height, width = model.denoiser.image_shape
    check_images("data", config.data, data, (height, width, channels))
    told = are_labels_told(config.labels, config.data, data, model.label_names)
    rows, num_images = data.num_rows, config.num_images or data.num_rows
    require(num_images <= rows, "num_images", num_images, f"{config.data} holds {rows:,}; ask for at most as many")
    sampler, steps = _sampler_asked(config, model)
    assert config.precision != "auto"
    return EncodeRequest(
        model_id=model.model_id,
        dataset_id=data.dataset_id,
        num_images=num_images,
        sampler=sampler,
        steps=steps,
        clip_x_0=config.clip_x_0,
        dtype=DTYPE_OF[config.precision],
        device=config.cluster.device,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        labels=None if told is None else "given" if told else "null",
    )


def _sampler_asked(config: EncodeConfig, model: Model) -> tuple[Sampler, int]:
    """The sampler that leads back, and its steps."""
    process = model.denoiser.process
    ends = "its SNR ends at 0, where nothing is left of an image; take another model"
    require(process.prior_signal > 0.0, "model", config.model, ends)
    sampler, steps = sampler_asked(config.sampler, model.denoiser)
    try:
        encoding_times(process, sampler)
    except ConfigError as error:
        raise ConfigError(f"sampler.{error}") from error
    return sampler, steps
