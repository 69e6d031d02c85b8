"""A trained model on disk: `ema.safetensors` and `config.json`, nothing that could run code.

`config.json` holds the network, the schedule, what the caller adds (data set, step, ...) and the
SHA-256 of the weights and of itself; the model id is a SHA-256 over both files.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import NetworkDenoiser
from ddpm_core.errors import ModelError
from ddpm_core.parameterizations import DENOISERS, denoiser_named
from ddpm_core.process import process_from_config
from ddpm_core.process.continuous import ContinuousProcess

WEIGHTS_FILE = "ema.safetensors"
CONFIG_FILE = "config.json"
FORMAT = "ddpm-pipeline-model"
FORMAT_VERSION = 1
# What a config.json without a name of the denoiser means.
_DENOISER = "eps"


@dataclass(frozen=True)
class Model:
    """A loaded model: the `denoiser` in eval mode with averaged weights, all of config.json
    (`config["extra"]` is what the caller of `save_model` added) and the `model_id`."""

    denoiser: NetworkDenoiser
    config: dict[str, Any]
    model_id: str

    @property
    def extra(self) -> dict[str, Any]:
        """What the caller of `save_model` added: of a training its data set, step and so on."""
        extra: dict[str, Any] = self.config["extra"]
        return extra

    @property
    def label_names(self) -> tuple[str, ...]:
        """The K classes' names: those that the training has added as `label_names`, else their numbers; none of a model
        without labels."""
        classes = self.denoiser.num_classes
        names = self.extra.get("label_names")
        if classes and isinstance(names, list) and len(names) == classes:
            return tuple(map(str, names))
        return tuple(map(str, range(classes or 0)))


def model_bytes(weights: Mapping[str, Tensor], denoiser: NetworkDenoiser, extra: Mapping[str, Any]) -> dict[str, bytes]:
    """The two files of a model by name: the same bytes for the same content, on any machine.

    `weights`: by name, as `EMA.state_dict()` gives them, for the network of `denoiser`. `extra` must be JSON-able.
    """
    content = save({name: weights[name].detach().cpu().contiguous() for name in sorted(weights)})
    kind = {known: name for name, known in DENOISERS.items()}[type(denoiser)]
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **({} if kind == _DENOISER else {"denoiser": kind}),
        **denoiser.to_config(),
        "extra": dict(extra),
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    config["config_sha256"] = _config_hash(config)
    text = json.dumps(config, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return {WEIGHTS_FILE: content, CONFIG_FILE: text.encode()}


def model_id_of(files: Mapping[str, bytes]) -> str:
    """The model's id: hex SHA-256 over the hashes of both files."""
    hashes = [hashlib.sha256(files[name]).hexdigest() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def save_model(
    directory: str | Path,
    weights: Mapping[str, Tensor],
    denoiser: NetworkDenoiser,
    extra: Mapping[str, Any],
) -> str:
    """Write the model's two files into `directory` (made if missing) and return its model id."""
    files = model_bytes(weights, denoiser, extra)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return model_id_of(files)


def load_model(directory: str | Path, device: torch.device | str = "cpu") -> Model:
    """The model in `directory`. Raises ModelError if a file is missing, altered or of another format."""
    directory = Path(directory)
    files = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            files[name] = (directory / name).read_bytes()
        except OSError as error:
            reason = f"{error.strerror}; a model is {CONFIG_FILE} and {WEIGHTS_FILE}"
            raise ModelError(f"{directory / name}: {reason}") from None
    return model_from_bytes(files, device, where=str(directory))


def model_from_bytes(files: Mapping[str, bytes], device: torch.device | str = "cpu", where: str = "model") -> Model:
    """The inverse of `model_bytes`; `where` names the place in errors. Raises ModelError."""
    try:
        config = json.loads(files[CONFIG_FILE], parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}/{CONFIG_FILE}: not JSON ({error}); fetch the model again") from None
    found = (config.get("format"), config.get("format_version")) if isinstance(config, dict) else None
    if found != (FORMAT, FORMAT_VERSION):
        raise ModelError(f"{where}/{CONFIG_FILE}: format {found} is not {(FORMAT, FORMAT_VERSION)}; update")
    if config.get("config_sha256") != _config_hash(config):
        raise ModelError(f"{where}/{CONFIG_FILE}: altered, its hash differs; fetch the model again")
    for name in ("network", "schedule", "extra"):
        if not isinstance(config.get(name), dict):
            raise ModelError(f"{where}/{CONFIG_FILE}: {name} = {config.get(name)!r:.100} is no object; save it again")
    if config.get("weights_sha256") != hashlib.sha256(files[WEIGHTS_FILE]).hexdigest():
        raise ModelError(f"{where}/{WEIGHTS_FILE}: altered, its hash differs; fetch the model again")
    try:
        kind = denoiser_named(config.get("denoiser", _DENOISER))
        network, process = UNetConfig.from_dict(config["network"]), process_from_config(config["schedule"])
        with torch.device("meta"):
            wanted = kind.build(network, process).named_weights()
        state = _checked_weights(files[WEIGHTS_FILE], wanted, f"{where}/{WEIGHTS_FILE}")
        denoiser = kind.build(network, process)
        for name, parameter in denoiser.named_weights().items():
            parameter.data.copy_(state[name])
        if isinstance(process, ContinuousProcess):
            process.schedule.check_rises()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{where}: does not describe a network of this version ({reason})") from None
    return Model(denoiser.to(device).eval().requires_grad_(False), config, model_id_of(files))


def _checked_weights(content: bytes, wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file: exactly those `wanted`, float32 and finite, or a ModelError.

    Those wanted lie on the meta device: a network that a few bytes of configuration make enormous is never built.
    """
    try:
        state = load(content)
    except SafetensorError as error:
        raise ModelError(f"{where}: not a safetensors file ({error}); fetch the model again") from None
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state:
            raise ModelError(f"{where}: lacks the tensor {name} of the network; save the model again")
        if name not in wanted:
            raise ModelError(f"{where}: the network has no tensor {name!r:.100}; save the model again")
        have, want = state[name], wanted[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            raise ModelError(
                f"{where}: {name} is {have.dtype} {list(have.shape)}, the network's is {want.dtype} "
                f"{list(want.shape)}; save the model again"
            )
        if not bool(have.isfinite().all()):
            raise ModelError(f"{where}: {name} has values that are not finite (NaN or infinite); take another model")
    return state


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.100} is beyond what a number can be")
    return number


def _config_hash(config: Mapping[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
