"""The section of the sampler: what is refused, and whose fields are whose."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from support.sample_runs import save_tiny_model

from ddpm_core.model import load_model
from pipelines.cli.config import parse
from pipelines.cli.errors import ConfigError
from pipelines.sampling.config import SampleConfig
from pipelines.sampling.sampler_config import OWN_FIELDS, SamplerConfig
from pipelines.sampling.samplers import SAMPLERS

GIVEN = ["--model", "m", "--output", "o", "--num_images", "5"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"steps": 0}, r"sampler\.steps = 0: must be at least 1"),
        ({"steps": 1_000_001}, r"sampler\.steps = 1000001: must be at most 1,000,000"),
        ({"name": "ddim", "eta": 1.5}, r"sampler\.eta = 1\.5: must be in \[0, 1\]"),
        ({"eta": float("nan")}, r"sampler\.eta = nan: must be in \[0, 1\]"),
        ({"eta": 0.5}, r"sampler\.eta = 0\.5: is a parameter of --sampler\.name ddim"),
        ({"name": "dpmpp_3m", "steps": 2}, r"sampler\.steps = 2: must be at least 3, the order of dpmpp_3m"),
        ({"name": "dpmpp_2m_sde", "steps": 1}, r"sampler\.steps = 1: must be at least 2, the order of dpmpp_2m_sde"),
        ({"name": "dpmpp_2m", "churn": 5.0}, r"sampler\.churn = 5\.0: is a parameter of --sampler\.name heun"),
        ({"name": "heun", "churn": -1.0}, r"sampler\.churn = -1\.0: must be finite and at least 0"),
        ({"name": "heun", "churn_noise": 0.0}, r"sampler\.churn_noise = 0\.0: must be finite and above 0"),
        ({"name": "heun", "churn_interval": (2.0, 1.0)}, r"sampler\.churn_interval = .*: must be two noise levels .*"),
        ({"name": "heun", "churn_noise": 1.1}, r"sampler\.churn_noise = 1\.1: does nothing without sampler\.churn .*"),
        ({"name": "heun", "churn_interval": (0.1, 9.0)}, r"sampler\.churn_interval = .*: does nothing without .*"),
        ({"name": "ddim", "tolerance": 0.0}, r"sampler\.tolerance = 0\.0: must be finite and above 0"),
        ({"name": "ddim", "tolerance": -1.0}, r"sampler\.tolerance = -1\.0: must be finite and above 0"),
        ({"name": "ddim", "tolerance": 0.1, "steps": 5}, r"sampler\.steps = 5: is found by sampler\.tolerance; .*"),
        ({"name": "ddpm", "tolerance": 0.1}, r"sampler\.tolerance = 0\.1: needs a sampler without noise, .* not ddpm"),
        ({"name": "heun", "churn": 1.0, "tolerance": 0.1}, r"sampler\.tolerance = 0\.1: needs a sampler without .*"),
        ({"name": "ddim", "sigma2": "learned"}, r"sampler\.sigma2 = 'learned': is a parameter of --sampler\.name ddpm"),
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}$"):
        SamplerConfig(**values)


def test_fixed_variances_may_stand_beside_every_sampler() -> None:
    """Recipes that were printed before hold them with every sampler."""
    for sigma2 in ("auto", "beta", "beta_tilde"):
        assert SamplerConfig("ddim", 50, 0.5, sigma2).sigma2 == sigma2


def test_the_section_on_the_command_line_and_in_a_recipe(tmp_path: Path) -> None:
    words = ["--sampler.name", "ddim", "--sampler.steps", "50", "--sampler.eta", "0.5", "--sampler.sigma2", "beta"]
    assert parse(SampleConfig, [*GIVEN, *words], "").sampler == SamplerConfig("ddim", 50, 0.5, "beta")
    assert parse(SampleConfig, GIVEN, "").sampler == SamplerConfig("ddpm", None, 0.0, "auto")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sampler:\n  name: ddim\n  steps: 50\n")
    argv = [*GIVEN, "--config", str(recipe), "--sampler.steps", "20"]
    assert parse(SampleConfig, argv, "").sampler == SamplerConfig("ddim", 20)


def test_the_section_may_be_called_as_its_former_field(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    argv = [*GIVEN, "--config", str(recipe)]
    recipe.write_text("sampler: ddim\nsteps: 50\n")
    with pytest.raises(ConfigError) as refusal:
        parse(SampleConfig, argv, "")
    assert str(refusal.value) == (
        f"config = {recipe}: sampler is now sampler.name, steps is now sampler.steps; "
        "write sampler.name: ddim, sampler.steps: 50"
    )
    recipe.write_text(str(refusal.value).partition("; write ")[2].replace(", ", "\n"))
    assert parse(SampleConfig, argv, "").sampler == SamplerConfig("ddim", 50)
    assert parse(SampleConfig, [*GIVEN, "--sampler", "{name: ddim, steps: 20}"], "").sampler.steps == 20
    recipe.write_text("sampler:\nlabels: all\n")
    with pytest.raises(ConfigError, match="sampler = None: is empty; give a value or leave it out"):
        parse(SampleConfig, argv, "")


def test_every_sampler_is_in_the_tables_and_every_own_field_in_the_section(tmp_path: Path) -> None:
    names = get_args(get_type_hints(SamplerConfig)["name"])
    assert set(names) == set(SAMPLERS) == set(OWN_FIELDS)
    own = {field for of_one in OWN_FIELDS.values() for field in of_one}
    assert own <= {field.name for field in fields(SamplerConfig)} - {"name", "steps"}
    save_tiny_model(tmp_path / "model")
    denoiser = load_model(tmp_path / "model").denoiser
    for name in names:
        kind, churning = SAMPLERS[name], {"churn": 1.0, "churn_interval": (0.1, 5.0)} if name == "heun" else {}
        chosen = kind.chosen(SamplerConfig(name, **churning), 5, denoiser)
        assert kind.options(chosen).keys() - {"spacing"} == set(OWN_FIELDS[name]), name
