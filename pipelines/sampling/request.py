"""What a sample set answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ddpm_core.model import Model
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import Sampler
from pipelines.cli.errors import ConfigError
from pipelines.cluster.precision import DTYPE_OF, Dtype
from pipelines.outputs.request import Request, read_fields, read_value
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.samplers import SAMPLERS, name_of
from pipelines.storage.location import Location


@dataclass(frozen=True)
class SampleRequest(Request):
    """The values that determine every image of a sample set.

    Attributes:
        model_id: Hash of the model's files.
        num_images: Ids are 0..num_images-1.
        seed: Of all noise.
        sampler: Stored by its name in `SAMPLERS`, its options beside it.
        steps: Calls of the network for an image.
        clip_x_0: Whether every predicted x_0 is clamped to the range of pixels.
        dtype: Precision of the network.
        device: What computes.
        batch_size: Images in one call of the network.
        shard_size: Images in one object.
        format: Of the objects.
    """

    model_id: str
    num_images: int
    seed: int
    sampler: Sampler
    steps: int
    clip_x_0: bool
    dtype: Dtype
    device: Literal["cpu", "cuda"]
    batch_size: int
    shard_size: int
    format: Literal["parquet", "webdataset"]

    @property
    def on_gpu(self) -> bool:
        """See `Request`."""
        return self.device == "cuda"

    @property
    def num_shards(self) -> int:
        """All are of `shard_size` images but the last."""
        return -(-self.num_images // self.shard_size)

    @property
    def described_sampler(self) -> str:
        """For a person."""
        return SAMPLERS[name_of(self.sampler)].described(self.sampler, self.steps)

    def to_json(self) -> dict[str, Any]:
        """See `Request`."""
        name = name_of(self.sampler)
        return {
            **super().to_json(),
            "sampler": name,
            "eta": None,
            "sigma2": None,
            **SAMPLERS[name].options(self.sampler),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], path: Location) -> Self:
        """See `Request`."""

        def read(name: str, hint: Any) -> Any:
            return read_value(hint, stored.get(name), path, f"request.{name}")

        kind = SAMPLERS[read("sampler", Literal[*SAMPLERS])]
        sampler = kind.stored(read, read("steps", int))
        own = kind.options(sampler)
        for name in {"eta", "sigma2"} - own.keys():
            read(name, type(None))
        options = {"sampler", "eta", "sigma2", *own}
        rest = {name: value for name, value in stored.items() if name not in options}
        return read_fields(cls, rest, path, sampler=sampler)


def request_of(config: SampleConfig, model: Model) -> SampleRequest:
    """The request that a job's fields make with a model; every `auto` has been settled.

    Raises:
        ConfigError: The model has other numbers of steps, or another variance.
    """
    process = model.denoiser.process
    num_timesteps = process.num_timesteps if isinstance(process, DiscreteProcess) else None
    if config.steps is not None and num_timesteps is not None and config.steps > num_timesteps:
        most = f"the model has {num_timesteps} diffusion steps; ask for at most as many"
        raise ConfigError(f"steps = {config.steps}: {most}")
    kind = SAMPLERS[config.sampler]
    steps = config.steps or kind.steps(num_timesteps)
    assert isinstance(config.seed, int)
    assert config.precision != "auto"
    return SampleRequest(
        model_id=model.model_id,
        num_images=config.num_images,
        seed=config.seed,
        sampler=kind.chosen(config, steps, model.denoiser),
        steps=steps,
        clip_x_0=config.clip_x_0,
        dtype=DTYPE_OF[config.precision],
        device="cuda" if config.cluster.gpus_per_worker else "cpu",
        batch_size=config.batch_size,
        shard_size=config.chosen_shard_size,
        format=config.format,
    )
