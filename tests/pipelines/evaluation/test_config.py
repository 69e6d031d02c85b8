"""Refusals before anything is started: field, value and rule in one line."""

from typing import Any

import pytest

from pipelines.cli.config import parse
from pipelines.cli.errors import ConfigError
from pipelines.evaluation.config import EvaluateConfig, OdeConfig

GIVEN = ["--model", "m", "--data", "d", "--output", "o"]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("timesteps_per_image", 0, "must be an even number, at least 2"),
        ("timesteps_per_image", 7, "must be an even number, at least 2"),
        ("draws", 0, "must be in 1..1000"),
        ("target_halfwidth", 0, "must be above 0"),
        ("target_halfwidth", -0.1, "must be above 0"),
        ("num_images", 1, "must be at least 2"),
        ("shard_size", 40, "must be a multiple of 16"),
        ("seed", -1, "must not be negative"),
        ("cluster.num_workers", "[3,1]", "must be 0, a positive number, or"),
        ("cluster.gpus_per_worker", 1.5, r"must be in \[0, 1\) or whole"),
        ("cluster.cpus_per_worker", 0, "must be positive and finite"),
        ("ode.steps", 3, "must be an even number, at least 4"),
        ("ode.probes", 1, "must be in 2..1000"),
        ("ode.num_images", -1, "must not be negative"),
        ("estimator", "some", ""),
        ("sigma2", "gamma", ""),
        ("num_timesteps", 1, r"must be in 2..\d+, or null"),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*{rule}") as refusal:
        parse(EvaluateConfig, [*GIVEN, f"--{field}={value}"], "")
    assert "\n" not in str(refusal.value)


def test_a_target_needs_a_known_error() -> None:
    with pytest.raises(ConfigError, match="draws = 1: must be at least 2 to know the half-width"):
        EvaluateConfig("m", "d", "o", estimator="all", draws=1, target_halfwidth=0.1)


def test_the_command_line_becomes_a_config() -> None:
    config = parse(
        EvaluateConfig, [*GIVEN, "--estimator", "all", "--ode.num_images", "4", "--cluster.num_workers", "[1,4]"], ""
    )
    assert (config.estimator, config.ode, config.cluster.num_workers) == ("all", OdeConfig(num_images=4), (1, 4))
