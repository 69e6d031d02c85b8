"""Bad models: directories, safetensors, network configurations and references."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_inputs.files import Build, prepared
from bad_inputs.harness import Case
from bad_inputs.model_files import Json, Tensors, model_files
from support.image_files import write

_WEIGHT = "conv_in.weight"


class _Touch:
    """What a pickle can do when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def sample(reference: str = "model", *options: str) -> list[str]:
    """The command line that samples from `reference` into `out`."""
    return ["sample.py", "--model", reference, "--output", "out", "--num_images", "4", "--root", "root", *options]


def _files(files: Callable[[], dict[str, bytes]], *says: str, name: str) -> Case:
    def build(at: Path) -> list[str]:
        write(at / "model", files())
        return sample()

    return Case("Model", name, build, says)


def _config(name: str, change: Callable[[Json], object], *says: str, kind: str = "eps") -> Case:
    return _files(lambda: model_files(config=change, kind=kind), *says, name=name)


def _network(name: str, field: str, value: object, *says: str) -> Case:
    return _config(name, lambda config: config["network"].update({field: value}), *says)


def _schedule(name: str, kind: str, fields: Json, *says: str) -> Case:
    return _config(name, lambda config: config["schedule"].update(fields), *says, kind=kind)


def _tensors(name: str, change: Callable[[Tensors], object], *says: str, kind: str = "eps") -> Case:
    return _files(lambda: model_files(tensors=change, kind=kind), *says, name=name)


def _weights(name: str, content: Callable[[], bytes], *says: str) -> Case:
    return _files(lambda: model_files(weights=content()), *says, name=name)


def _text(name: str, content: bytes, *says: str) -> Case:
    return _files(lambda: {**model_files(), "config.json": content}, *says, name=name)


def _spoil(value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[_WEIGHT].view(-1).__setitem__(3, value)


def _header(entries: object, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def _without(name: str) -> Callable[[Json], object]:
    return lambda config: config.pop(name)


def _altered(at: Path) -> list[str]:
    files = model_files()
    weights = bytearray(files["ema.safetensors"])
    weights[-1] ^= 1
    write(at / "model", {**files, "ema.safetensors": bytes(weights)})
    return sample()


def _kept(source: bytes) -> Build:
    """An unfinished sample set whose copy of the model is damaged."""

    def build(at: Path) -> list[str]:
        write(at / "out" / "model", {**model_files(), "source.json": source})
        return sample("models:/digits@champion")

    return build


def _reference(name: str, reference: str, *says: str) -> Case:
    return Case("Model reference", name, lambda at: sample(reference), says)


def _no_database(at: Path) -> list[str]:
    write(at, {"root/mlflow.db": b"this is no database" * 100})
    return sample("models:/digits@champion")


def _no_server(at: Path) -> list[str]:
    return sample("models:/digits@champion", "--tracking.uri", "gopher://host")


def _data_set(at: Path) -> list[str]:
    write(at / "model", prepared())
    return sample()


def _asked(name: str, kind: str, options: list[str], *says: str) -> Case:
    """A good model, asked for what its kind does not have."""

    def build(at: Path) -> list[str]:
        write(at / "model", model_files(kind=kind))
        return sample("model", *options)

    return Case("Model reference", name, build, says, code=2)


_ANOTHER = b'{"reference": "a", "uri": "a", "name": "a", "model_id": "a", "run_id": null}'
_NOT = "model/ema.safetensors: not a safetensors file ("
_NO_NETWORK = "model: does not describe a network of this version ("
_CONFIG = "model/config.json: "
_NEITHER = "holds neither a model (config.json, ema.safetensors) nor the checkpoints of a training; check the spelling"

CASES = [
    _files(lambda: {"config.json": model_files()["config.json"]}, "model = model: holds neither", name="no weights"),
    _files(lambda: {"ema.safetensors": b""}, "model/config.json: cannot read: does not exist", name="no config.json"),
    _text("config.json of zero bytes", b"", f"{_CONFIG}not JSON ("),
    _text("config.json cut off", b'{"format": "ddpm', f"{_CONFIG}not JSON ("),
    _text("config.json that is a list", b"[1]", f"{_CONFIG}format None is not"),
    _text("config.json 100,000 brackets deep", b"[" * 100_000, f"{_CONFIG}not JSON ("),
    _text("config.json with NaN", b'{"format": NaN}', f"{_CONFIG}not JSON (NaN is no JSON number)"),
    _text("config.json with a number beyond all", b'{"format": 1e999}', f"{_CONFIG}not JSON (1e999 is beyond"),
    _text("config.json of another software", b'{"_class_name": "UNet2DModel"}', f"{_CONFIG}format (None, None) is not"),
    _config("a later version", lambda config: config.update(format_version=9), "('ddpm-pipeline-model', 9) is not"),
    _text(
        "edited by hand",
        b'{"format": "ddpm-pipeline-model", "format_version": 1, "config_sha256": "0"}',
        f"{_CONFIG}altered, its hash differs",
    ),
    Case("Model", "weights with a flipped bit", _altered, ("ema.safetensors: altered, its hash differs; fetch",)),
    _config("no network", _without("network"), f"{_CONFIG}network = None is no object"),
    _config("no lineage", _without("extra"), f"{_CONFIG}extra = None is no object"),
    _config(
        "schedule that is a list", lambda config: config.update(schedule=[]), f"{_CONFIG}schedule = [] is no object"
    ),
    _network("unknown field of the network", "depth", 3, "network.depth: unknown field; the fields are"),
    _network("text for a number of channels", "base_channels", "8", "network.base_channels: '8' is not a whole number"),
    _network("fraction of a channel", "base_channels", 8.5, "network.base_channels: 8.5 is not a whole number"),
    _network(
        "image size of three sides", "image_size", [8, 8, 8], _NO_NETWORK, "network.image_size: (8, 8, 8) is not (H, W)"
    ),
    _network(
        "network of 10^9 channels",
        "base_channels",
        10**9,
        "network.base_channels: 1000000000 is not a whole number in 1..8192",
    ),
    _network(
        "network of 10^9 blocks",
        "num_res_blocks",
        10**9,
        "network.num_res_blocks: 1000000000 is not a whole number in 1..64",
    ),
    _network(
        "network of 10^6 levels", "channel_multipliers", [1] * 10**6, "network.channel_multipliers", "1 to 16 levels"
    ),
    _network(
        "network of 300 GB behind weights of 100 kB", "base_channels", 8192, "the network's is torch.float32 [8192"
    ),
    _config(
        "schedule of 10^12 steps",
        lambda config: config["schedule"].update(num_timesteps=10**12),
        "schedule.num_timesteps: 1000000000000 is not in 1..1000000",
    ),
    _config(
        "schedule with a negative variance",
        lambda config: config["schedule"].update(beta_start=-1.0),
        "schedule.betas[0]: -1.0 is not in (0, 1)",
    ),
    _config(
        "unknown schedule", lambda config: config["schedule"].update(name="exec"), "schedule.name: 'exec' is not one"
    ),
    _config(
        "unknown meaning of the network's output",
        lambda config: config.update(denoiser="score"),
        "denoiser: 'score' is not one of ['edm', 'eps', 'residual_eps', 'v', 'x_0']",
    ),
    _network(
        "learned variances that are a text",
        "learned_variance",
        "yes",
        "network.learned_variance: 'yes' is not true or false",
    ),
    _network(
        "Fourier features of 2^40",
        "fourier_features",
        [6, 40],
        "network.fourier_features: (6, 40) are not rising whole numbers in 0..16",
    ),
    _config(
        "learned variances in continuous time",
        lambda config: config["network"].update(learned_variance=True),
        "network.learned_variance: True needs a process of discrete time",
        kind="vdm",
    ),
    _config(
        "noise prediction where the terminal SNR is zero",
        lambda config: config.pop("denoiser"),
        "schedule.zero_terminal_snr: True leaves nothing of the image",
        kind="v, zero terminal SNR",
    ),
    _schedule("gamma that falls", "vdm", {"gamma_min": 6.0}, "schedule.gamma_min: 6.0 is not below gamma_max = 5.0"),
    _schedule("gamma that is a text", "vdm", {"gamma_max": "5"}, "schedule.gamma_max: '5' is not in -80..80"),
    _schedule("field of another schedule", "vdm", {"beta_end": 0.02}, "schedule: ", "'beta_end'"),
    _schedule("learned ends that are a text", "vdm, learned", {"learned_ends": "yes"}, "schedule.learned_ends: 'yes'"),
    _schedule("unknown family", "edm", {"family": "flow"}, "schedule.family: 'flow' is not one of"),
    _tensors(
        "learned gamma that falls",
        lambda tensors: tensors["process.schedule.low"].fill_(7.0),
        "gamma does not rise",
        kind="v, learned ends",
    ),
    _tensors(
        "a weight that is NaN", _spoil(float("nan")), f"{_WEIGHT} has values that are not finite (NaN or infinite)"
    ),
    _tensors("a weight that is infinite", _spoil(float("-inf")), f"{_WEIGHT} has values that are not finite"),
    _tensors("a tensor missing", lambda tensors: tensors.pop(_WEIGHT), f"lacks the tensor {_WEIGHT} of the network"),
    _tensors(
        "a tensor too many",
        lambda tensors: tensors.update(backdoor=tensors[_WEIGHT].clone()),
        "the network has no tensor 'backdoor'",
    ),
    _tensors(
        "a tensor of another shape",
        lambda tensors: tensors.update({_WEIGHT: tensors[_WEIGHT].flatten()}),
        f"{_WEIGHT} is torch.float32 [72], the network's is torch.float32 [8, 1, 3, 3]",
    ),
    _tensors(
        "tensors of another type",
        lambda tensors: tensors.update({_WEIGHT: tensors[_WEIGHT].half()}),
        f"{_WEIGHT} is torch.float16 [8, 1, 3, 3]",
    ),
    _weights("weights of zero bytes", lambda: b"", _NOT),
    _weights("weights cut off in the header", lambda: model_files()["ema.safetensors"][:100], _NOT),
    _weights("weights cut off in the data", lambda: model_files()["ema.safetensors"][:-4], _NOT),
    _weights("header of 2^63 bytes", lambda: struct.pack("<Q", 2**63) + b"{}", _NOT),
    _weights("header that is no JSON", lambda: struct.pack("<Q", 4) + b"{{{{", _NOT),
    _weights(
        "tensor beyond the end of the file",
        lambda: _header({_WEIGHT: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        _NOT,
    ),
    _weights(
        "tensors that overlap",
        lambda: _header(
            {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("a", "b")}, bytes(16)
        ),
        _NOT,
    ),
    _weights("a pickle in place of safetensors", lambda: pickle.dumps(_Touch()), _NOT),
    _weights("a zip file, as torch.save writes", lambda: b"PK\x03\x04" + bytes(200), _NOT),
    Case(
        "Model", "copy beside samples that says nothing", _kept(b"{}"), ("out/model/source.json: does not say where",)
    ),
    Case("Model", "copy beside samples that is another", _kept(_ANOTHER), ("out/model: is not the model a",)),
    _reference("nothing there", "model", "model = model: ", _NEITHER),
    _reference("no name", "models:/", "model = models:/: is none of models:/NAME@ALIAS"),
    _reference("too many parts", "models:/a/b/c", "model = models:/a/b/c: is none of models:/NAME@ALIAS"),
    _reference("no database", "models:/digits@champion", "there is no MLflow database at root/mlflow.db; set"),
    Case(
        "Model reference",
        "database that is none",
        _no_database,
        ("model = models:/digits@champion: MLflow does not give it (", "file is not a database"),
        leaves=("root/mlflow.db.lock",),
    ),
    Case("Model reference", "a data set", _data_set, (f"model = model: {_NEITHER}",)),
    Case("Model reference", "server of an unknown protocol", _no_server, ("MLflow does not give it (", "gopher")),
    _asked(
        "more steps than the model has",
        "eps",
        ["--sampler.steps", "21"],
        "sampler.steps = 21: the model has 20 diffusion steps; ask for at most as many",
    ),
    _asked(
        "learned variances of a model without them",
        "eps",
        ["--sampler.sigma2", "learned"],
        "sampler.sigma2: 'learned' needs a model that predicts its variances; take beta or beta_tilde",
    ),
    _asked(
        "a grid that the noise schedule does not have",
        "v, zero terminal SNR",
        ["--sampler.name", "dpmpp_2m", "--sampler.spacing", "log_snr"],
        "sampler.spacing: 'log_snr' needs a process that ends above SNR 0; take 'time' or 'quadratic'",
    ),
    _asked(
        "fewer steps than the order of the solver",
        "eps",
        ["--sampler.name", "dpmpp_3m", "--sampler.steps", "2"],
        "sampler.steps = 2: must be at least 3, the order of dpmpp_3m",
    ),
    _asked(
        "a tolerance that no number of steps keeps",
        "v",  # whose images move by 0.00269 in fp32 and in bf16; those of ε by rounding errors, which differ by machine
        ["--sampler.name", "ddim", "--sampler.tolerance", "1e-12"],
        "sampler.tolerance = 1e-12: is not kept by 20 steps, which move images by 0.00269; raise it",
    ),
    _asked(
        "beta of a model in continuous time",
        "vdm",
        ["--sampler.sigma2", "beta"],
        "sampler.sigma2: 'beta' is no variance of a continuous process",
    ),
]
