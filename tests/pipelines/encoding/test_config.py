"""The encoding job's configuration: what is refused, before and after model and data are read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.encode_runs import request_by_hand, tiny_encoding
from support.model_kinds import KINDS

from pipelines.cli.config import parse
from pipelines.cli.errors import ConfigError, DataError
from pipelines.data.dataset import PreparedDataset
from pipelines.encoding.config import EncodeConfig
from pipelines.sampling.sampler_config import SamplerConfig

GIVEN = ["--model", "m", "--data", "d", "--output", "o"]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("model", "", "must be a directory, a URI or models:/NAME@ALIAS"),
        ("data", "", "must be the URI of a prepared data set"),
        ("num_images", 0, "must be at least 1"),
        ("num_images", 200_000_000, "must be at most 1000000 x shard_size"),
        ("batch_size", 0, r"must be in 1\.\.65536"),
        ("shard_size", 2**21, r"must be in 1\.\.1048576"),
        ("root", "s3://bucket/home", "must be a local directory"),
    ],
)
def test_what_is_refused_before_anything_is_read(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} = {value!r}: {rule}"):
        EncodeConfig(**{"model": "m", "data": "d", "output": "o", field: value})


def test_a_section_that_is_given_in_part_keeps_the_rest_of_the_default() -> None:
    assert parse(EncodeConfig, GIVEN, "").sampler == SamplerConfig("dpmpp_2m", spacing="log_snr")
    config = parse(EncodeConfig, [*GIVEN, "--sampler.steps", "30", "--clip_x_0"], "")
    assert (config.sampler, config.clip_x_0) == (SamplerConfig("dpmpp_2m", 30, spacing="log_snr"), True)


@pytest.mark.parametrize(
    ("section", "refusal"),
    [
        ({"name": "ddpm"}, "sampler.name = 'ddpm': draws noise, and no way leads back; take a sampler that draws none"),
        ({"name": "dpmpp_2m_sde"}, "sampler.name = 'dpmpp_2m_sde': draws noise, and no way leads back"),
        ({"name": "ddim", "eta": 0.5}, "sampler.eta = 0.5: draws noise, and no way leads back"),
        ({"name": "heun", "churn": 2.0}, "sampler.churn = 2.0: draws noise, and no way leads back"),
        ({"name": "ddim", "tolerance": 0.1}, "sampler.tolerance = 0.1: is for sampling; give sampler.steps"),
    ],
)
def test_a_sampler_that_draws_noise_or_has_no_number_of_steps_is_refused(section: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        EncodeConfig("m", "d", "o", sampler=SamplerConfig(**section))


@pytest.mark.parametrize(
    ("kind", "fields", "refusal"),
    [
        ("eps", {"sampler": {"steps": 21}}, "sampler.steps = 21: the model has 20 diffusion steps"),
        ("eps", {"sampler": {"steps": 1}}, "sampler.steps: 1 is from the noisiest time to the image at once"),
        ("v, zero terminal SNR", {}, "its SNR ends at 0, where nothing is left of an image; take another model"),
        ("eps", {"num_images": 21}, "num_images = 21: "),
        ("eps", {"labels": "given"}, "labels = 'given': the model was trained without labels"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path, kind: str, fields: dict[str, Any], refusal: str
) -> None:
    KINDS[kind].save(tmp_path / "model")
    data = make_dataset(20)
    with pytest.raises(ConfigError, match=re.escape(refusal)):
        request_by_hand(tiny_encoding(tmp_path, data, **fields), data)


@pytest.mark.parametrize(
    ("made", "fields", "refusal"),
    [
        ({"shape": (4, 16, 1)}, {}, "images are 4x16x1 (H x W x C), the model's are 8x8x1"),
        ({}, {"labels": "given"}, "has no labels, which labels = given needs; ingest with labels"),
        ({"labels": [3] * 9}, {}, "has the label 3, the model's classes are 0..2"),
        ({"labels": [1] * 9, "label_names": ["a", "b", "c"]}, {}, "calls class 0 'a', the model '0'"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused(
    make_dataset: Callable[..., PreparedDataset],
    tmp_path: Path,
    made: dict[str, Any],
    fields: dict[str, Any],
    refusal: str,
) -> None:
    KINDS["eps, labels"].save(tmp_path / "model")
    data = make_dataset(9, **made)
    with pytest.raises(DataError, match=re.escape(refusal)):
        request_by_hand(tiny_encoding(tmp_path, data, **fields), data)


@pytest.mark.parametrize(
    ("kind", "labels", "asked", "told"),
    [
        ("eps", [1] * 9, "auto", None),
        ("eps", [1] * 9, "null", None),
        ("eps, labels", [1] * 9, "auto", "given"),
        ("eps, labels", [None] * 8 + [1], "given", "given"),
        ("eps, labels", None, "auto", "null"),
        ("eps, labels", [3] * 9, "null", "null"),
    ],
)
def test_what_the_model_is_told_of_labels(
    make_dataset: Callable[..., PreparedDataset],
    tmp_path: Path,
    kind: str,
    labels: list[int | None] | None,
    asked: str,
    told: str | None,
) -> None:
    KINDS[kind].save(tmp_path / "model")
    data = make_dataset(9, labels=labels)
    assert request_by_hand(tiny_encoding(tmp_path, data, labels=asked), data).labels == told
