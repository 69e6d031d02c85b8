"""A small good model of any kind, to be spoiled; its digests are made anew, as who means harm would."""

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Tensors = dict[str, Any]


@functools.cache
def _good(kind: str) -> tuple[bytes, bytes]:
    from support.model_kinds import EXTRA, KINDS

    from ddpm_core.model import CONFIG_FILE, WEIGHTS_FILE, model_bytes

    denoiser = KINDS[kind].build()
    files = model_bytes(denoiser.named_weights(), denoiser, EXTRA)
    return files[CONFIG_FILE], files[WEIGHTS_FILE]


def model_files(
    config: Callable[[Json], object] = lambda config: None,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
    weights: bytes | None = None,
    kind: str = "eps",
) -> dict[str, bytes]:
    """The files of a model with a changed configuration and changed tensors, or other weights altogether.

    `kind`: of `support.model_kinds`.
    """
    from safetensors.torch import load, save

    content = json.loads(_good(kind)[0])
    if weights is None:
        state = load(_good(kind)[1])
        tensors(state)
        weights = save(state)
    content["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    config(content)
    del content["config_sha256"]
    text = json.dumps(content, sort_keys=True)
    content["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return {"config.json": json.dumps(content).encode(), "ema.safetensors": weights}
