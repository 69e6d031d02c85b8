"""What a sample set answers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from ddpm_core.guidance import check_interval, check_scale, check_weaker
from ddpm_core.model import Model
from ddpm_core.process.variances import Learned
from ddpm_core.samplers.base import Clip, Sampler
from ddpm_core.samplers.ddpm import DDPM
from pipelines.cli.config import require
from pipelines.cli.errors import ConfigError
from pipelines.cluster.precision import DTYPE_OF, Dtype
from pipelines.data.dataset import Int64s
from pipelines.outputs.request import Request, read_fields, read_value
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.labels import SampleLabels
from pipelines.sampling.samplers import SAMPLERS, described, name_of, sampler_asked, stored_sampler
from pipelines.storage.location import Location


@dataclass(frozen=True)
class SampleRequest(Request):
    """The values that determine every image of a sample set.

    Attributes:
        model_id: Hash of the model's files.
        num_images: Ids are 0..num_images-1.
        seed: Of all noise.
        sampler: Stored by its name in `SAMPLERS`, its options beside it.
        steps: Of the sampler.
        clip_x_0: Whether every predicted x_0 is clamped to the range of pixels.
        dtype: Precision of the network.
        device: What computes.
        batch_size: Images in one call of the network.
        shard_size: Images in one object.
        format: Of the objects.
        label_classes: Indices of the classes that are asked for; None where `label_dataset_id` is, and without labels.
        label_counts: Images of each of them, one class after another; None where they alternate.
        label_dataset_id: The data set whose rows 0..num_images-1 have the labels.
        guidance_scale: w; None of images without labels that no weaker model guides.
        guidance_interval: [low, high] in noise levels; None guides everywhere.
        guidance_model_id: Hash of the weaker model's files.
        dynamic_threshold: The percentile of `Clip`, if one is asked for.
        tolerance: By which the steps were found, if they were.
        interpolate: The two ids between whose noise the preview shows images.
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
    label_classes: tuple[int, ...] | None = None
    label_counts: tuple[int, ...] | None = None
    label_dataset_id: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, ...] | None = None
    guidance_model_id: str | None = None
    dynamic_threshold: float | None = None
    tolerance: float | None = None
    interpolate: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        classes, counts = self.label_classes, self.label_counts
        if classes is not None and (not classes or min(classes) < 0 or self.label_dataset_id is not None):
            raise ConfigError("label_classes are indices >= 0, where no label_dataset_id is")
        if counts is not None:
            each = classes is not None and len(counts) == len(classes) and min(counts) >= 1
            if not each or sum(counts) != self.num_images:
                raise ConfigError("label_counts are one >= 1 for each of label_classes, num_images in all")
        if self.guidance_scale is None and (self.guidance_interval, self.guidance_model_id) != (None, None):
            raise ConfigError("guidance has a scale")
        check_scale(self.guidance_scale or 0.0, "guidance_scale")
        if self.guidance_interval is not None and len(self.guidance_interval) != 2:
            raise ConfigError("guidance_interval is two noise levels")
        check_interval(self.interval, "guidance_interval")
        if self.interpolate is not None and len(self.interpolate) != 2:
            raise ConfigError("interpolate is two ids")
        _ = self.clip

    @property
    def on_gpu(self) -> bool:
        """See `Request`."""
        return self.device == "cuda"

    @property
    def num_shards(self) -> int:
        """All are of `shard_size` images but the last."""
        return -(-self.num_images // self.shard_size)

    @property
    def interval(self) -> tuple[float, float] | None:
        """`guidance_interval`."""
        return None if self.guidance_interval is None else (self.guidance_interval[0], self.guidance_interval[1])

    @property
    def clip(self) -> Clip | None:
        """Of predicted images. Raises ConfigError for a percentile that is none."""
        return Clip(self.dynamic_threshold) if self.clip_x_0 else None

    @property
    def has_labels(self) -> bool:
        """Whether images have labels."""
        return self.label_classes is not None or self.label_dataset_id is not None

    def labels(self, of_rows: Int64s | None) -> SampleLabels | None:
        """Of every image; `of_rows` int64 are those of the data set's rows, where it has them."""
        if not self.has_labels:
            return None
        if self.label_dataset_id is None:
            return SampleLabels(self.num_images, self.label_classes, self.label_counts)
        assert of_rows is not None
        return SampleLabels(self.num_images, dataset_id=self.label_dataset_id, of_rows=of_rows[: self.num_images])

    def with_steps(self, steps: int) -> Self:
        """The same with another number of steps."""
        sampler: Any = self.sampler  # a dataclass
        return replace(self, steps=steps, sampler=replace(sampler, steps=steps))

    @property
    def described_sampler(self) -> str:
        """For a person."""
        return described(self.sampler, self.steps)

    @property
    def described_guidance(self) -> str:
        """For a person; empty without guidance."""
        if self.guidance_scale is None:
            return ""
        where = "" if self.interval is None else f" at noise levels {self.interval[0]:g} to {self.interval[1]:g}"
        by = f", by model {self.guidance_model_id[:12]}" if self.guidance_model_id else ""
        return f"w = {self.guidance_scale:g}{where}{by}"

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
        sampler, rest = stored_sampler(stored, path)
        for name in {"eta", "sigma2"} & rest.keys():
            read_value(type(None), rest.pop(name), path, f"request.{name}")
        return read_fields(cls, rest, path, sampler=sampler)


def request_of(
    config: SampleConfig, model: Model, labels: SampleLabels | None = None, weaker: Model | None = None
) -> SampleRequest:
    """The request that a job's fields make with a model; every `auto` has been settled.

    Args:
        config: The job's.
        model: What samples.
        labels: As settled of `config.labels`.
        weaker: The model that `config.guidance.model` stands for.

    Raises:
        ConfigError: The sampler or the weaker model does not fit the model; there is no such id as `config.interpolate`
            names.
    """
    guidance = config.guidance
    sampler, steps = sampler_asked(config.sampler, model.denoiser)
    if weaker is not None:
        _check_weaker(config, sampler, model, weaker)
    is_guided = labels is not None or weaker is not None
    assert isinstance(config.seed, int)
    assert config.precision != "auto"
    assert config.num_images is not None
    if config.interpolate is not None:
        rule = f"must be two ids of the images, 0..{config.num_images - 1}"
        require(max(config.interpolate) < config.num_images, "interpolate", config.interpolate, rule)
    return SampleRequest(
        model_id=model.model_id,
        num_images=config.num_images,
        seed=config.seed,
        sampler=sampler,
        steps=steps,
        clip_x_0=config.clip_x_0,
        dtype=DTYPE_OF[config.precision],
        device=config.cluster.device,
        batch_size=config.batch_size,
        shard_size=config.chosen_shard_size,
        format=config.format,
        label_classes=labels.classes if labels else None,
        label_counts=labels.counts if labels else None,
        label_dataset_id=labels.dataset_id if labels else None,
        guidance_scale=guidance.scale if is_guided else None,
        guidance_interval=guidance.interval if is_guided else None,
        guidance_model_id=weaker.model_id if weaker else None,
        dynamic_threshold=config.dynamic_threshold,
        tolerance=config.sampler.tolerance,
        interpolate=config.interpolate,
    )


def _check_weaker(config: SampleConfig, sampler: Sampler, model: Model, weaker: Model) -> None:
    field = f"guidance.model = {config.guidance.model}"
    try:
        check_weaker(model.denoiser, weaker.denoiser)
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from error
    if model.label_names != weaker.label_names:
        raise ConfigError(f"{field}: calls its classes otherwise than the model; take one of the same data")
    # Only with w = 0 does a step take the weaker model's prediction as it is, and its variance with it.
    alone = config.guidance.scale == 0.0 and not weaker.denoiser.learns_variance
    if alone and isinstance(sampler, DDPM) and isinstance(sampler.variance, Learned):
        raise ConfigError(
            f"{field}: with guidance.scale = 0 it samples alone, and it predicts no variances, as "
            "sampler.sigma2 = learned needs; give --sampler.sigma2 beta_tilde"
        )
