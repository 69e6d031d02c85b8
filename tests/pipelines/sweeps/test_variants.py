"""Which trainings a command line of jobs/sweep.py asks for."""

import re

import pytest

from pipelines.cli.errors import ConfigError
from pipelines.sweeps.variants import sweep_of


def test_every_combination_is_a_training_of_its_own_name() -> None:
    options = ["--name", "s", "--vary", "train.learning_rate=1e-4,3e-4", "--train.steps", "7", "--vary", "seed=0,1"]
    asked = sweep_of([*options, "--parallel", "2"])
    assert [variant.config.name for variant in asked.variants] == [
        "s.learning_rate-1e-4.seed-0",
        "s.learning_rate-1e-4.seed-1",
        "s.learning_rate-3e-4.seed-0",
        "s.learning_rate-3e-4.seed-1",
    ]
    assert [variant.label for variant in asked.variants[:2]] == [
        "learning_rate 1e-4, seed 0",
        "learning_rate 1e-4, seed 1",
    ]
    assert [variant.config.train.learning_rate for variant in asked.variants] == [1e-4, 1e-4, 3e-4, 3e-4]
    assert {variant.config.train.steps for variant in asked.variants} == {7}
    assert asked.parallel == 2


def test_lists_are_values_and_fields_of_one_name_are_told_apart() -> None:
    asked = sweep_of(["--vary", "network.channel_multipliers=[1,2],[1,2,2]"])
    assert [variant.config.network.channel_multipliers for variant in asked.variants] == [(1, 2), (1, 2, 2)]
    assert asked.variants[1].config.name == "digits.channel_multipliers-1_2_2"
    asked = sweep_of(["--vary", "validation.every_steps=5", "--vary", "grid.every_steps=5,6"])
    assert asked.variants[1].config.name == "digits.validation.every_steps-5.grid.every_steps-6"


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ([], "vary = None: must name a field and its values"),
        (["--vary", "seed"], "vary = 'seed': must be FIELD=VALUE"),
        (["--vary", "seed=1,"], "vary = 'seed=1,': must be FIELD=VALUE"),
        (["--vary", "seed=1", "--vary", "seed=2"], "must not name a field twice"),
        (["--vary", "name=a,b"], "vary = 'name=a,b': must not vary name"),
        (["--vary", "tracking.uri=a,b"], "must not vary tracking.uri"),
        (["--vary", "seed=1,1"], "must not give two variants one name"),
        (["--vary", "seed=0,-1"], "variant seed -1: seed = -1: must not be negative"),
        (["--vary", "sed=0"], "variant sed 0: .*did you mean --seed"),
        (["--vary", "seed=1", "--parallel", "0"], "parallel = '0': must be in 1..9999"),
        (["--vary"], "argument --vary: expected one argument"),
    ],
)
def test_what_is_no_sweep_is_refused(options: list[str], refusal: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(refusal)):
        sweep_of(options)
