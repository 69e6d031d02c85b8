"""From a user's `--features` to an extractor, each kind one entry of `KINDS`."""

from collections.abc import Callable
from pathlib import Path

from ddpm_core.model import model_from_bytes
from pipelines.cli.config import require
from pipelines.models.find import find_model
from pipelines.models.used import UsedModel
from pipelines.quality.extractors import inception, model, onnx, pixels, random_conv
from pipelines.quality.extractors.asking import Asked, Asking
from pipelines.quality.extractors.config import OnnxConfig
from pipelines.quality.extractors.request import INCEPTION, MODEL, ONNX, PIXELS, RANDOM_CONV, ExtractorRequest


def _ask_model(asking: Asking) -> Asked:
    """`model:MODEL`, one of our own. It is looked up here, apart from what workers import: it may lie in MLflow."""
    require(bool(asking.rest), asking.field, asking.features, "must name a model, as model:models:/NAME@champion")
    found = find_model(asking.rest, asking.tracking_uri, asking.root, asking.field)
    used = UsedModel(found, model_from_bytes(found.files, where=found.uri))
    shapes = f"the model's images have the shape {used.image_shape} (H, W, C), and these {asking.image_shape}"
    rule = f"{shapes}; take another model, or give --resize"
    require(used.image_shape == asking.image_shape, asking.field, asking.features, rule)
    denoiser = used.model.denoiser
    log_snr = denoiser.process.at(model.feature_time(denoiser.process)).log_snr.item()
    words = f"levels / 127.5 - 1, without noise, at log-SNR {log_snr:.3g}, mean of the middle block over places"
    request = ExtractorRequest(MODEL, found.model_id, model.num_features(denoiser), asking.image_shape, words)
    return Asked(request, model=found)


KINDS: dict[str, Callable[[Asking], Asked]] = {
    RANDOM_CONV: random_conv.ask,
    PIXELS: pixels.ask,
    INCEPTION: inception.ask,
    ONNX: onnx.ask,
    MODEL: _ask_model,
}


def extractor_asked(
    features: str,
    onnx: OnnxConfig,
    image_shape: tuple[int, int, int],
    tracking_uri: str | None,
    root: Path,
    any_weights: bool = False,
    field: str = "features",
) -> Asked:
    """The extractor that a user asks for, checked against the images.

    Args:
        features: `random_conv`, `random_conv:64`, `random_conv:512`, `pixels`, `inception:FILE`, `onnx:FILE` or
            `model:MODEL`; FILE is a path or a URI, MODEL what `find_model` takes.
        onnx: How an ONNX model is to be called.
        image_shape: (H, W, C) of the images.
        tracking_uri: Of MLflow, for `model:`.
        root: Directory of the local MLflow database, for `model:`.
        any_weights: Whether `inception:` takes other weights than the FID's.
        field: The name of the field, for messages.

    Raises:
        ConfigError: There is no such extractor, it does not fit the images, or a package that it needs is missing.
        ModelError: The file is not what it should be.
        StorageError: The file cannot be read.
    """
    kind = features.partition(":")[0]
    known = "random_conv, random_conv:512, pixels, inception:FILE, onnx:FILE or model:MODEL"
    require(kind in KINDS, field, features, f"must be one of {known}")
    return KINDS[kind](Asking(features, image_shape, onnx, any_weights, field, tracking_uri, root))
