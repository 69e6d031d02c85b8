"""A config.json of any kind of model with any field spoiled: a model that samples, or one line that refuses it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs.model_files import Json, model_files

from ddpm_core.model import CONFIG_FILE, Model, model_from_bytes
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM
from pipelines.cli.errors import ModelError

ABSENT = "absent"
# JSON has no infinity, but 1e999 is read as one.
STRANGE: list[Any] = [ABSENT, None, True, -1, 1.5, 10**30, float("inf"), "exploding", [1]]
# The parts of a config.json that tell the kinds apart.
FIELDS = [
    ("", "denoiser"),
    ("network", "fourier_features"),
    ("network", "learned_variance"),
    ("schedule", "name"),
    ("schedule", "num_timesteps"),
    ("schedule", "zero_terminal_snr"),
    ("schedule", "gamma_min"),
    ("schedule", "gamma_max"),
    ("schedule", "learned_ends"),
    ("schedule", "family"),
    ("schedule", "unknown"),
]


def spoiled(kind: str, part: str, field: str, value: Any) -> dict[str, bytes]:
    def change(config: Json) -> None:
        fields = config[part] if part else config
        if value == ABSENT:
            fields.pop(field, None)
        else:
            fields[field] = value

    return model_files(change, kind=kind)


def loaded_or_refused(files: dict[str, bytes]) -> tuple[Model | None, str]:
    try:
        return model_from_bytes(files, where="model"), ""
    except ModelError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", ["v, zero terminal SNR", "learned variances", "v, learned ends", "edm"])
def test_whatever_a_field_holds_the_model_samples_or_is_refused_in_one_line(kind: str) -> None:
    loaded, config = 0, json.loads(model_files(kind=kind)[CONFIG_FILE])
    fields = [(part, name) for part, name in FIELDS if part != "schedule" or name in config[part] or name == "unknown"]
    for part, field in fields:
        for value in STRANGE:
            files = spoiled(kind, part, field, value)
            files[CONFIG_FILE] = files[CONFIG_FILE].replace(b"Infinity", b"1e999")
            model, refused = loaded_or_refused(files)
            if model is None:
                assert re.fullmatch(r"model.{1,400}", refused), (field, value, refused)
                continue
            loaded += 1
            x = sample(model.denoiser, DDIM(1), torch.arange(2), 0)
            assert bool(x.isfinite().all()), (field, value)
    assert loaded >= 3, "what is left out at its default, and numbers that make another model"


def test_the_files_of_the_models_are_good_before_they_are_spoiled() -> None:
    config = json.loads(model_files(kind="edm")[CONFIG_FILE])
    assert config["denoiser"] == "edm"
    assert config["schedule"]["family"] == "exploding"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["process.schedule.low"].fill_(7.0),
        lambda tensors: tensors["process.schedule.high"].fill_(-14.0),
        lambda tensors: [tensors[f"process.schedule.weight_{n}"].zero_() for n in (1, 3)],
    ],
    ids=["low above high", "high below low", "flat"],
)
def test_a_learned_gamma_that_does_not_rise_is_refused(change: Any) -> None:
    with pytest.raises(ModelError, match=r"^model[^\n]*gamma does not rise[^\n]*$"):
        model_from_bytes(model_files(tensors=change, kind="v, learned ends"))


def test_a_learned_gamma_keeps_its_ends_and_its_shape(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["process.schedule.low"].fill_(-12.0)
        tensors["process.schedule.weight_1"].fill_(-3.0)

    process = model_from_bytes(model_files(tensors=change, kind="v, learned ends")).denoiser.process
    times = process.grid(4)
    assert process.prior_signal > 0.0
    assert float(times[0]) == pytest.approx(5.0)
    assert float(process.after(times)[-1]) == pytest.approx(-12.0)
