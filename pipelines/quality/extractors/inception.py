"""Features of the Inception network of 2015 (Szegedy 2016), of which the Fréchet distance is the FID (Heusel 2017).

Network and resizing are torch-fidelity's, which agree with the TensorFlow graph of the FID's authors; the weights are a
file of the user's, and nothing is downloaded.
"""

import functools
import importlib.util
import io
import pickle
import warnings
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from ddpm_core.networks.exact import exact
from pipelines.cli.config import require
from pipelines.cli.errors import ConfigError, ModelError
from pipelines.quality.extractors.asking import Asked, Asking, kept_content
from pipelines.quality.extractors.request import FID_SHA256, INCEPTION, Extractor, ExtractorRequest
from pipelines.storage.location import Location

NUM_FEATURES = 2048
_FILE = "inception.weights"
_PREPROCESSING = "{channels}bilinear to 299 x 299 as TensorFlow 1 has it (not antialiased), (level - 128) / 128"


def ask(asking: Asking) -> Asked:
    """`inception:FILE`, a state_dict as torch or safetensors write it. Raises ModelError for other weights than the
    FID's, unless any are asked for, and for a file that is no such network's."""
    _require_installed(f"{asking.field} = {asking.features!r:.300}")
    file = asking.read("the network's weights (weights-inception-2015-12-05-6726825d.pth)")
    channels = asking.image_shape[2]
    rule = f"the images have {channels} channels, and it takes grey or RGB images; take random_conv"
    require(channels in (1, 3), asking.field, asking.features, rule)
    if file.sha256 != FID_SHA256 and not asking.any_weights:
        raise ModelError(
            f"{file.uri}: its sha256 begins with {file.sha256[:12]}, that of the FID's network with {FID_SHA256[:12]}; "
            f"fetch the file again, or set any_weights, and its numbers are called {INCEPTION}_{file.sha256[:8]}"
        )
    _network(file.content, file.uri)
    name = INCEPTION if file.sha256 == FID_SHA256 else f"{INCEPTION}_{file.sha256[:8]}"
    preprocessing = _PREPROCESSING.format(channels="channel repeated three times, " if channels == 1 else "")
    request = ExtractorRequest(name, file.sha256, NUM_FEATURES, asking.image_shape, preprocessing)
    return Asked(request, {_FILE: file.content})


def load(request: ExtractorRequest, directory: Location, threads: int, device: str) -> Extractor:
    """The network from the weights that the output keeps."""
    _require_installed(request.name)
    network = _network(kept_content(directory, _FILE, request.sha256), (directory / _FILE).uri).to(device)

    def features(images: Tensor) -> Tensor:
        channels_first = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        found: Tensor = network(channels_first.contiguous())[0]
        return found

    return functools.partial(exact, features, device)


def _network(content: bytes, uri: str) -> torch.nn.Module:
    """torch-fidelity's network with the weights of a file, in evaluation mode."""
    # It unpickles what it is given: so it is given what was written here.
    own = io.BytesIO()
    torch.save(_weights(content, uri), own)
    own.seek(0)
    # Takes seconds, which bad weights need not wait for.
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network: torch.nn.Module = FeatureExtractorInceptionV3(INCEPTION, [str(NUM_FEATURES)], own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{uri}: is not of torch-fidelity's Inception network ({reason}); take its weights") from error
    return network


def _weights(content: bytes, uri: str) -> Mapping[str, Tensor]:
    """The tensors of a file by name, without running anything that is in it."""
    try:
        if content[8:9] == b"{":  # after the length of the header
            return load_safetensors(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's versions: what cannot be read is an error anyway
            weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{uri}: is no file of weights, or holds objects that could run code; refused") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{uri}: cannot be read as weights ({reason}); fetch it again") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelError(f"{uri}: is no state_dict, tensors by name; save the network's state_dict()")
    # As a plain dict, without what else torch keeps of it.
    return dict(weights)


def _require_installed(field: str) -> None:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ConfigError(f"{field}: needs torch-fidelity; pip install 'ddpm-pipeline[inception]'")
