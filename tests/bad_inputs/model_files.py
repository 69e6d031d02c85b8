"""A small good model, to be spoiled; its digests are made anew, as who means harm would."""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Tensors = dict[str, Any]


@functools.cache
def _good() -> tuple[bytes, bytes]:
    from support.sample_runs import NETWORK, tiny_state

    from ddpm_core.model import CONFIG_FILE, WEIGHTS_FILE, model_bytes
    from ddpm_core.parameterizations import EpsDenoiser
    from ddpm_core.process.discrete import DiscreteProcess

    extra = {"step": 7, "dataset": {"id": "d" * 64, "uri": "/data/tiny", "num_rows": 9}, "code_version": "0.0"}
    files = model_bytes(tiny_state(), EpsDenoiser.build(NETWORK, DiscreteProcess.linear(20)), extra)
    return files[CONFIG_FILE], files[WEIGHTS_FILE]


def model_files(
    config: Callable[[Json], object] = lambda config: None,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
    weights: bytes | None = None,
) -> dict[str, bytes]:
    """The files of a model with a changed configuration and changed tensors, or other weights altogether."""
    from safetensors.torch import load, save

    content = json.loads(_good()[0])
    if weights is None:
        state = load(_good()[1])
        tensors(state)
        weights = save(state)
    content["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    config(content)
    del content["config_sha256"]
    text = json.dumps(content, sort_keys=True)
    content["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return {"config.json": json.dumps(content).encode(), "ema.safetensors": weights}
