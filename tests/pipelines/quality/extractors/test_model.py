"""The middle of our own U-Nets as features."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.extractors import asked_for, images_of, kept_and_loaded
from support.model_kinds import KINDS

from ddpm_core.images import to_model_range
from ddpm_core.process.base import factor
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from pipelines.cli.errors import ConfigError, ModelError
from pipelines.quality.extractors.model import LOG_SNR, feature_time

SHAPE = (8, 8, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_mean_of_what_the_middle_block_gives(kind: str, tmp_path: Path) -> None:
    KINDS[kind].save(tmp_path / "m")
    asked = asked_for(f"model:{tmp_path / 'm'}", SHAPE, tmp_path / "extractor")
    images = images_of(3, SHAPE)
    found = kept_and_loaded(asked, tmp_path / "extractor")(images)
    assert found.shape == (3, asked.request.num_features)

    denoiser, seen = KINDS[kind].build(), []
    denoiser.network.middle_2.register_forward_hook(lambda module, given, out: seen.append(out))
    time = feature_time(denoiser.process).expand(3)
    x_0 = to_model_range(torch.from_numpy(images))
    denoiser(factor(denoiser.process.at(time).alpha, x_0) * x_0, time)
    np.testing.assert_allclose(found, seen[0].mean((2, 3)).numpy(), rtol=1e-4, atol=1e-5)


def test_an_image_s_features_do_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    KINDS["eps"].save(tmp_path / "m")
    asked = asked_for(f"model:{tmp_path / 'm'}", SHAPE, tmp_path / "extractor")
    extract = kept_and_loaded(asked, tmp_path / "extractor")
    images, others = images_of(4, SHAPE), images_of(4, SHAPE, seed=1)
    others[2] = images[2]
    np.testing.assert_array_equal(extract(images)[2], extract(others)[2])


def test_the_time_is_the_noisiest_of_so_little_noise() -> None:
    process = DiscreteProcess.linear(1000)
    time = feature_time(process)
    here, next_one = (process.at(t).log_snr.item() for t in (time, time + 1))
    assert here >= LOG_SNR > next_one
    continuous = ContinuousProcess.linear()
    assert continuous.at(feature_time(continuous)).log_snr.item() == pytest.approx(LOG_SNR)


def test_a_process_of_more_noise_from_the_beginning_is_taken_at_its_beginning() -> None:
    process = DiscreteProcess.from_alpha_sigma([1.0, 1.0], [1.0, 2.0])
    assert feature_time(process).tolist() == [0]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    KINDS["eps"].save(tmp_path / "m")
    with pytest.raises(ConfigError, match=re.escape("the model's images have the shape (8, 8, 1) (H, W, C), and")):
        asked_for(f"model:{tmp_path / 'm'}", (8, 8, 3), tmp_path / "extractor")
    with pytest.raises(ConfigError, match=re.escape("features = 'model:': must name a model, as model:models:/NAME@")):
        asked_for("model:", SHAPE, tmp_path / "extractor")
    with pytest.raises(ModelError, match=r"features = .*none: holds neither a model"):
        asked_for(f"model:{tmp_path / 'none'}", SHAPE, tmp_path / "extractor")


def test_a_kept_model_that_is_another_one_is_refused(tmp_path: Path) -> None:
    KINDS["eps"].save(tmp_path / "m")
    asked = asked_for(f"model:{tmp_path / 'm'}", SHAPE, tmp_path / "extractor")
    kept_and_loaded(asked, tmp_path / "extractor")
    (tmp_path / "extractor" / "ema.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="extractor: is not the model"):
        kept_and_loaded(asked, tmp_path / "extractor")
