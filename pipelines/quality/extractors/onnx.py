"""Features of any network that a user brings as an ONNX file, called as the user declares."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.cli.config import require
from pipelines.cli.errors import ConfigError, ModelError
from pipelines.quality.extractors.asking import Asked, Asking, File, kept_content
from pipelines.quality.extractors.config import OnnxConfig
from pipelines.quality.extractors.request import ONNX, Extractor, ExtractorRequest, Float32s, OnnxRequest, UInt8s
from pipelines.quality.resize import KERNEL, resize
from pipelines.storage.location import Location

_FILE = "model.onnx"
_SCALE = {"0..1": (1.0 / 255.0, 0.0), "-1..1": (1.0 / 127.5, -1.0), "0..255": (1.0, 0.0)}
# How far a row's features may move with the other rows of its batch: rounding, not batch statistics.
_SAME_ROW = 1e-3


def ask(asking: Asking) -> Asked:
    """`onnx:FILE`. Raises ModelError for a file that is no such model, or not of images to one vector each, and
    ConfigError where it takes other images than declared."""
    _require_installed(f"{asking.field} = {asking.features!r:.300}")
    file = asking.read("an ONNX model")
    _refuse_external_data(file)
    session = _session(file.content, file.uri, 1, "cpu")
    taken = _Input.of(session, file.uri)
    called = _called(taken, _output(session, file.uri, asking.onnx), asking)
    num_features = _probed(_Onnx(session, called, taken.batch), asking.image_shape, file.uri)
    request = ExtractorRequest(ONNX, file.sha256, num_features, asking.image_shape, _in_words(called, asking), called)
    return Asked(request, {_FILE: file.content}, without_gpu=None if _has_cuda() else "this onnxruntime has no CUDA")


def load(request: ExtractorRequest, directory: Location, threads: int, device: str) -> Extractor:
    """A session of the model that the output keeps."""
    _require_installed(request.name)
    assert request.onnx is not None
    uri = (directory / _FILE).uri
    session = _session(kept_content(directory, _FILE, request.sha256), uri, threads, device)
    return _Onnx(session, request.onnx, _Input.of(session, uri).batch)


@dataclass(frozen=True)
class _Onnx:
    """The extractor. `batch`: the number of images that the model takes at once, None: any."""

    session: Any
    called: OnnxRequest
    batch: int | None

    def __call__(self, images: UInt8s) -> Float32s:
        """See `Extractor`. A model of a fixed batch gets the images in its portions, the last filled up with the last
        image."""
        given = prepared(self.called, images)
        portion = self.batch or len(given)
        found = []
        for first in range(0, len(given), portion):
            rows = np.minimum(np.arange(first, first + portion), len(given) - 1)
            features = self.session.run([self.called.output], {self.called.input: given[rows]})[0]
            found.append(features[: len(given) - first])
        return np.concatenate(found).reshape(len(given), -1)


def prepared(called: OnnxRequest, images: UInt8s) -> Float32s:
    """What the model is given of images uint8 [B, H, W, C]: float32 [B, channels, height, width]."""
    height, width = called.size
    resized = resize(images, (height, width)).astype(np.float32)
    scale, offset = _SCALE[called.range]
    values = np.broadcast_to(resized, (*resized.shape[:3], called.channels)) * np.float32(scale) + np.float32(offset)
    mean, std = np.array(called.mean or 0.0, np.float32), np.array(called.std or 1.0, np.float32)
    return np.ascontiguousarray(((values - mean) / std).transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class _Input:
    """What the file says of its one input; a None is left open."""

    name: str
    batch: int | None
    channels: int | None
    height: int | None
    width: int | None

    @classmethod
    def of(cls, session: Any, uri: str) -> "_Input":
        """Raises ModelError unless it is one float32 [B, C, H, W]."""
        inputs = session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(each.name for each in inputs) or "none"
            raise ModelError(f"{uri}: has the inputs {names}; a model of one input, images, is needed")
        shape = [side if isinstance(side, int) and side > 0 else None for side in inputs[0].shape]
        if inputs[0].type != "tensor(float)" or len(shape) != 4:
            raise ModelError(
                f"{uri}: its input {inputs[0].name} is {inputs[0].type} {inputs[0].shape}, and images are float32 "
                "[B, C, H, W]; export it so"
            )
        return cls(inputs[0].name, *shape)


def _output(session: Any, uri: str, config: OnnxConfig) -> str:
    outputs = {output.name: output for output in session.get_outputs()}
    names = ", ".join(outputs)
    if config.output is None and len(outputs) != 1:
        raise ConfigError(f"onnx.output: {uri} has the outputs {names}; name the one that is the features")
    name = config.output or next(iter(outputs))
    require(name in outputs, "onnx.output", name, f"{uri} has the outputs {names}; name one of them")
    if outputs[name].type != "tensor(float)":
        raise ModelError(f"{uri}: its output {name} is {outputs[name].type}, and features are float32; export it so")
    return name


def _called(taken: _Input, output: str, asking: Asking) -> OnnxRequest:
    """How the model is called for the images. Raises ConfigError where file, declaration and images do not agree."""
    config, (height, width, channels) = asking.onnx, asking.image_shape
    declared = config.size * 2 if len(config.size) == 1 else config.size
    own = taken.height or height, taken.width or width
    size = declared or own
    for side, fixed in zip(size, (taken.height, taken.width), strict=True):
        rule = f"the model takes {taken.height or 'any'} x {taken.width or 'any'} pixels; leave it out"
        require(fixed in (None, side), "onnx.size", list(config.size), rule)
    wanted = taken.channels or channels
    rule = f"the images have {channels} channels, and the model takes {wanted}"
    require(channels == wanted or (channels, wanted) == (1, 3), asking.field, asking.features, rule)
    for name, values in (("onnx.mean", config.mean), ("onnx.std", config.std)):
        require(len(values) in (0, wanted), name, list(values), f"must have {wanted} numbers, one for each channel")
    return OnnxRequest(size, wanted, config.range, config.mean, config.std, taken.name, output)


def _probed(extract: _Onnx, image_shape: tuple[int, int, int], uri: str) -> int:
    """The number of features, by calling the model. Raises ModelError unless it gives each image a finite vector of
    its own."""
    images = np.random.default_rng(0).integers(0, 256, (3, *image_shape), np.uint8)
    results = []
    for pair in ([0, 1], [0, 2]):
        try:
            given = prepared(extract.called, images[pair])
            given = np.resize(given, (extract.batch or len(given), *given.shape[1:]))
            results.append(extract.session.run([extract.called.output], {extract.called.input: given})[0])
        except Exception as error:  # onnxruntime's errors have no class in common
            raise ModelError(f"{uri}: fails on images of {extract.called.size} pixels ({_short(error)})") from error
    first, second = results
    if first.shape[:1] != (len(given),) or first.ndim < 2 or any(side != 1 for side in first.shape[2:]):
        raise ModelError(
            f"{uri}: its output {extract.called.output} is {list(first.shape)} for {len(given)} images, and features "
            "are [B, d] or [B, d, 1, 1]; average over places, or name another output as onnx.output"
        )
    if not np.isfinite(first).all():
        raise ModelError(f"{uri}: gives features that are NaN or infinite; check onnx.range, onnx.mean and onnx.std")
    if np.abs(first[0] - second[0]).max() > _SAME_ROW * max(float(np.abs(first).max()), 1e-30):
        raise ModelError(f"{uri}: an image's features depend on the other images of its batch; export it for inference")
    return int(first.shape[1])


def _in_words(called: OnnxRequest, asking: Asking) -> str:
    height, width = called.size
    steps = [f"resized to {height} x {width} ({KERNEL})"] if (height, width) != asking.image_shape[:2] else []
    if called.channels != asking.image_shape[2]:
        steps.append("channel repeated three times")
    steps.append(f"levels to {called.range}")
    steps += [f"minus {list(called.mean)}"] if called.mean else []
    steps += [f"over {list(called.std)}"] if called.std else []
    return ", ".join(steps)


def _session(content: bytes, uri: str, threads: int, device: str) -> Any:
    """A session that computes one operator after another with a fixed number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what is fatal: the rest is raised
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    if device == "cuda":
        if not _has_cuda():
            raise ConfigError(
                "cluster.gpus_per_worker: this onnxruntime has no CUDA; install onnxruntime-gpu, or give 0"
            )
        providers.insert(0, "CUDAExecutionProvider")
    try:
        return onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no class in common
        raise ModelError(f"{uri}: cannot be loaded as an ONNX model ({_short(error)}); export it again") from error


def _has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _refuse_external_data(file: File) -> None:
    """Raise ModelError for weights in other files, which would be read from wherever the model says."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(file.content)
    except DecodeError as error:
        raise ModelError(f"{file.uri}: is no ONNX model; export it again") from error
    if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in _messages(model, onnx.TensorProto)):
        raise ModelError(f"{file.uri}: has weights in other files; save it as one file (save_as_external_data=False)")


def _messages(message: Any, kind: type) -> Iterator[Any]:
    """All parts of a protobuf message that are of a kind, at any depth."""
    if isinstance(message, kind):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for part in value if isinstance(value, Sequence) or hasattr(value, "__len__") else [value]:
                yield from _messages(part, kind)


def _require_installed(field: str) -> None:
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{field}: needs {package}; pip install 'ddpm-pipeline[onnx]'")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
