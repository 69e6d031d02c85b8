"""The training job's fields: defaults that fit together, recipes that fit their data, refusals by name."""

import json
import math
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from ddpm_core.networks.unet import UNet
from ddpm_core.parameterizations import denoiser_named
from pipelines.cli.config import as_dict, differences, parse
from pipelines.cli.errors import ConfigError
from pipelines.training.config import (
    DIGITS_TEST,
    DataConfig,
    GridConfig,
    OptimizationConfig,
    TrainClusterConfig,
    TrainConfig,
    ValidationConfig,
)
from pipelines.training.diffusion import DiffusionConfig
from pipelines.training.learner import objective_of
from pipelines.training.network import NetworkConfig

CONFIGS = Path(__file__).parents[3] / "configs"


def read(*argv: str) -> TrainConfig:
    return parse(TrainConfig, argv, "Train.")


def check_objective(config: TrainConfig, image_shape: tuple[int, int, int]) -> None:
    """Make what every worker does, without its weights: denoiser and objective fit, or a ConfigError says why not."""
    network, process = config.network.unet_config(image_shape), config.diffusion.process()
    with torch.device("meta"):  # shapes without memory
        unet = UNet(network)
    objective_of(denoiser_named(config.diffusion.prediction)(unet, process), config.train)


def test_no_arguments_are_the_defaults_and_the_digits_recipe() -> None:
    assert read() == TrainConfig()
    named = replace(TrainConfig(), data=DataConfig(validation=DIGITS_TEST))
    assert read("--config", str(CONFIGS / "digits.yaml")) == named


@pytest.mark.parametrize(
    ("recipe", "image_shape", "parameters"),
    [
        ("digits", (8, 8, 1), None),
        ("digits_vdm", (8, 8, 1), None),
        ("digits_labels", (8, 8, 1), None),
        ("fashion_mnist", (28, 28, 1), 1.1e6),
        ("fashion_mnist_vdm", (28, 28, 1), 1.1e6),
        ("fashion_mnist_labels", (28, 28, 1), 1.1e6),
        ("cifar10", (32, 32, 3), 35.7e6),
        ("cifar10_vdm", (32, 32, 3), 30.6e6),
        ("cifar10_hybrid", (32, 32, 3), 49.1e6),
    ],
)
def test_recipes_parse_and_their_networks_take_their_images(recipe, image_shape, parameters) -> None:
    config = read("--config", str(CONFIGS / f"{recipe}.yaml"))
    assert config.name == recipe
    if recipe.endswith("_labels"):  # auto, which the data settle
        config = replace(config, network=replace(config.network, num_classes=10))
    check_objective(config, image_shape)
    with torch.device("meta"):  # shapes without memory
        unet = UNet(config.network.unet_config(image_shape))
    count = sum(parameter.numel() for parameter in unet.parameters())
    if parameters is not None:
        # the number the recipe's comment states; 35.7 million are DDPM's (Ho et al. 2020, appendix B)
        assert count == pytest.approx(parameters, abs=0.05e6)


def test_every_recipe_is_tested() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == [
        "cifar10", "cifar10_hybrid", "cifar10_vdm", "digits", "digits_labels", "digits_vdm",
        "fashion_mnist", "fashion_mnist_labels", "fashion_mnist_vdm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "told",
    [
        "name = 'a/b': must consist of",
        "name = '': must consist of",
        "data.train = '': must be the URI",
        "data.validation = '': must be the URI",
        "data.hold_out = 1: must be at least 2, or 0",
        "data.hold_out = -5: must be at least 2, or 0",
        "data.window_mib = 0: must be at least 1",
        "data.reads_ahead = 0: must be at least 1",
        "data.cpus_per_read = -1.0: must be a number >= 0",
        "diffusion.num_timesteps = 1: must be in 2..1000000",
        "diffusion.beta_start = 0.0: must be in (0, 1)",
        "diffusion.beta_end = 1.0: must be in (0, 1)",
        "diffusion.beta_start = 0.5: must not exceed beta_end",
        "diffusion.gamma_min = 5.0: must be below gamma_max = 5.0",
        "diffusion.gamma_min = -80.5: must be in -80..80",
        "diffusion.gamma_max = nan: must be in -80..80",
        "diffusion.sigma_min = 80.0: must be below sigma_max = 80.0",
        "diffusion.sigma_min = 0.0: must be in 1e-17..1e+17",
        "diffusion.sigma_max = inf: must be in 1e-17..1e+17",
        "diffusion.learned_ends = True: must be false with schedule linear",
        "train.vlb_timesteps = 0: must be in 1..1000000, or null",
        "train.adam_beta2 = 1.0: must be in [0, 1)",
        "validation.num_timesteps = 1: must be in 2..1000000, or null",
        "validation.num_timesteps = 1001: must be at most the number of diffusion steps = 1000",
        "network.learned_variance = True: must be false with train.loss simple",
        "train.loss = 'hybrid': must not be hybrid without network.learned_variance",
        "train.times = 'log_normal': must not be log_normal with schedule linear, prediction eps and loss simple",
        "train.vlb_timesteps = 100: must be null with schedule linear and train.loss simple",
        "validation.sigma2 = 'learned': must not be learned without network.learned_variance",
        "train.steps = 0: must be at least 1",
        "batch_size = 0: must be in 1..1048576",
        "train.learning_rate = 0.0: must be positive",
        "train.learning_rate = nan: must be positive",
        "train.learning_rate = inf: must be positive and finite",
        "train.grad_clip = 0.0: must be positive",
        "train.warmup_steps = -1: must not be negative",
        "train.weight_decay = -0.1: must not be negative",
        "seed = -1: must not be negative",
        "train.ema_decay = 1.0: must be in [0, 1)",
        "checkpoint.every_steps = 0: must be at least 1",
        "checkpoint.keep = 1: must be at least 2",
        "validation.num_images = 0: must be at least 1",
        "validation.timesteps_per_image = 1000: must be below",
        "grid.sampler_steps = 1001: must be at most",
        "grid.num_images = 0: must be at least 1",
        "quality.num_images = 72: must be 0, which turns it off, or at least 73",
        "quality.num_images = -1: must be 0, which turns it off, or at least 73",
        "quality.every_steps = 0: must be at least 1",
        "quality.sampler_steps = 0: must be at least 1",
        "cluster.num_workers = 0: must be >= 1",
        "cluster.num_workers = (3, 2): must be >= 1, or [min, max]",
        "cluster.cpus_per_worker = 0: must be positive",
        "cluster.threads_per_worker = -1: must be >= 0",
        "cluster.max_failures = -1: must not be negative",
        "tracking.every_steps = 0: must be at least 1",
    ],
)
def test_a_value_out_of_range_is_refused_by_name(told: str) -> None:
    path, value = told.partition(":")[0].split(" = ")
    section, _, name = path.rpartition(".")
    config = TrainConfig()
    value = eval(value, {"nan": math.nan, "inf": math.inf})
    with pytest.raises(ConfigError) as refusal:
        replace(config, **{section: replace(getattr(config, section), **{name: value})} if section else {name: value})
    assert str(refusal.value).startswith(told)
    assert "\n" not in str(refusal.value)


VDM = ("--diffusion.schedule", "gamma_linear", "--diffusion.prediction", "residual_eps", "--train.loss", "vlb")
REFUSED = {
    "--diffusion.zero_terminal_snr true": "diffusion.prediction = 'eps': must be x_0 or v with zero_terminal_snr",
    "--diffusion.zero_terminal_snr true --diffusion.prediction edm": "diffusion.prediction = 'edm': must be x_0 or v",
    "--diffusion.zero_terminal_snr true --diffusion.schedule edm": "diffusion.zero_terminal_snr = True: must be false",
    "--diffusion.schedule edm --diffusion.betas [.1,.2]": "diffusion.betas = (0.1, 0.2): must not be given with",
    "--diffusion.schedule gamma_linear --diffusion.learned_ends true": "diffusion.learned_ends = True: must be false",
    "--network.learned_variance true --train.loss vlb --diffusion.schedule gamma_linear": (
        "network.learned_variance = True: must be false with schedule gamma_linear, which has no betas"
    ),
    "--network.learned_variance true --train.loss hybrid --diffusion.schedule edm": (
        "network.learned_variance = True: must be false with schedule edm, which has no betas"
    ),
    "--diffusion.schedule gamma_learned": "train.loss = 'simple': must be vlb with schedule gamma_learned",
    "--diffusion.schedule edm --train.times importance": "train.times = 'importance': must not be importance with",
    "--diffusion.schedule edm --train.times log_normal": "train.times = 'log_normal': must not be log_normal with",
    "--diffusion.schedule gamma_linear --validation.sigma2 beta": "validation.sigma2 = 'beta': must be auto or beta_",
    "--diffusion.schedule edm --validation.sigma2 learned": "validation.sigma2 = 'learned': must be auto or beta_tilde",
    "--diffusion.schedule edm --train.vlb_timesteps 9": "train.vlb_timesteps = 9: must be null with schedule edm and",
    "--validation.num_timesteps 16": "validation.timesteps_per_image = 16: must be below the number of diffusion steps",
    "--quality.num_images 100 --quality.sampler_steps 1001": "quality.sampler_steps = 1001: must be at most",
    "--network.fourier_features [2,17]": "network.fourier_features",
    "--network.fourier_features [3,2]": "network.fourier_features",
}


@pytest.mark.parametrize(("options", "told"), REFUSED.items())
def test_fields_that_do_not_fit_each_other_are_refused_by_name(options: str, told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read(*options.split())
    assert str(refusal.value).startswith(told)
    assert "\n" not in str(refusal.value)


def test_continuous_time_has_as_many_steps_as_are_asked_for() -> None:
    config = read(*VDM, "--grid.sampler_steps", "2000", "--validation.timesteps_per_image", "2000")
    assert config.diffusion.table_length is None
    assert config.diffusion.process().to_config() == {"name": "gamma_linear", "gamma_min": -13.3, "gamma_max": 5.0}


def test_whatever_the_config_lets_through_can_be_trained() -> None:
    """Its rules are those of the core, which knows no names of fields: nothing is refused after the job has begun."""
    schedules, predictions, losses, times = (
        get_args(get_type_hints(section)[name])
        for section, name in (
            (DiffusionConfig, "schedule"),
            (DiffusionConfig, "prediction"),
            (OptimizationConfig, "loss"),
            (OptimizationConfig, "times"),
        )
    )
    fits, flags = 0, (False, True)
    grid, validation = GridConfig(sampler_steps=2), ValidationConfig(timesteps_per_image=2)
    for schedule, prediction, zero, learned in product(schedules, predictions, flags, flags):
        for loss, drawn, steps in product(losses, times, (None, 5)):
            try:
                config = TrainConfig(
                    network=NetworkConfig(4, (1,), learned_variance=learned),
                    diffusion=DiffusionConfig(schedule, 4, prediction=prediction, zero_terminal_snr=zero),
                    train=OptimizationConfig(loss=loss, times=drawn, vlb_timesteps=steps),
                    validation=validation,
                    grid=grid,
                )
            except ConfigError:
                continue
            check_objective(config, (4, 4, 1))
            fits += 1
    assert fits > 200


def test_no_clipping_is_null_and_every_config_is_json() -> None:
    for text in (".inf", "null"):
        config = read("--train.grad_clip", text)
        assert config.train.grad_clip is None
        assert json.loads(json.dumps(as_dict(config), allow_nan=False))["train"]["grad_clip"] is None


def test_a_batch_has_a_row_for_every_worker_and_part() -> None:
    train, cluster = OptimizationConfig(accumulate=3), TrainClusterConfig(num_workers=(1, 5))
    assert TrainConfig(batch_size=12, train=train, cluster=replace(cluster, num_workers=4)).batch_size == 12
    with pytest.raises(ConfigError, match=r"^batch_size = 12: must be at least workers x accumulate = 15"):
        TrainConfig(batch_size=12, train=train, cluster=cluster)


def test_a_table_of_betas_replaces_the_schedule_and_is_checked() -> None:
    betas = ["--diffusion.betas", "[0.1, 0.2, 0.3]", "--validation.timesteps_per_image", "2"]
    config = read(*betas, "--grid.sampler_steps", "3")
    assert config.diffusion.process().step_variance.tolist() == [0.1, 0.2, 0.3]
    with pytest.raises(ConfigError, match=r"grid\.sampler_steps = 4: must be at most .* = 3"):
        read(*betas, "--grid.sampler_steps", "4")
    with pytest.raises(ConfigError, match=r"validation\.timesteps_per_image = 16: must be below .* = 3"):
        read(*betas[:2], "--grid.sampler_steps", "3")
    with pytest.raises(ConfigError, match=r"diffusion\.betas\[1\] = 1\.5: must be in \(0, 1\)"):
        read("--diffusion.betas", "[0.1, 1.5]")
    with pytest.raises(ConfigError, match=r"diffusion\.betas = .*: must hold at least 2"):
        read("--diffusion.betas", "[0.1]")


def test_schedules_are_those_named() -> None:
    linear = TrainConfig().diffusion.process()
    assert (linear.num_timesteps, float(linear.step_variance[0]), float(linear.step_variance[-1])) == (1000, 1e-4, 0.02)
    assert read("--diffusion.schedule", "cosine").diffusion.process().config["name"] == "cosine"


def test_worker_ranges() -> None:
    assert read("--cluster.num_workers", "3").cluster.worker_range == (3, 3)
    assert read("--cluster.num_workers", "[1, 4]").cluster.worker_range == (1, 4)


# What may change between two attempts of one run, and what would make it another training.
FREE = {
    "name", "root", "data.train", "data.validation", "data.hold_out", "data.reads_ahead", "data.cpus_per_read",
    "train.steps", "train.accumulate", "train.compile",
}  # fmt: skip
LATER = {
    "network.fourier_features", "network.learned_variance", "diffusion.zero_terminal_snr", "diffusion.gamma_min",
    "diffusion.gamma_max", "diffusion.learned_ends", "diffusion.sigma_min", "diffusion.sigma_max",
    "diffusion.prediction", "train.times", "train.vlb_timesteps", "train.adam_beta2",
    "train.label_dropout", "network.num_classes", "data.balance_classes",
}  # fmt: skip
FREE_SECTIONS = {"checkpoint", "validation", "grid", "quality", "cluster", "tracking"}


def test_the_semantic_config_holds_every_field_that_decides_what_is_learned() -> None:
    def leaves(values: dict, prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in values.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
        return found

    config = TrainConfig()
    of_version_1 = {"batch_size": "train.batch_size", "precision": "train.precision", "seed": "train.seed"}
    every = {
        of_version_1.get(leaf, leaf) for leaf in leaves(as_dict(config)) if leaf.split(".")[0] not in FREE_SECTIONS
    }
    assert leaves(config.semantic()) == every - FREE - LATER
    # those of later versions decide too, where they are not what all checkpoints of before were trained with
    other = read(
        *("--diffusion.schedule", "gamma_learned", "--diffusion.learned_ends", "true", "--train.loss", "vlb"),
        *("--diffusion.gamma_min", "-9", "--diffusion.gamma_max", "4", "--train.vlb_timesteps", "9"),
        *("--diffusion.sigma_min", "0.1", "--diffusion.sigma_max", "9", "--diffusion.prediction", "v"),
        *("--network.fourier_features", "[2]", "--train.times", "uniform", "--train.adam_beta2", "0.9"),
        *("--network.num_classes", "10", "--train.label_dropout", "0.2", "--data.balance_classes"),
    )
    assert leaves(other.semantic()) == every - FREE - {"network.learned_variance", "diffusion.zero_terminal_snr"}
    learned = read("--network.learned_variance", "true", "--train.loss", "vlb", "--diffusion.prediction", "v")
    zero = replace(learned, diffusion=replace(learned.diffusion, zero_terminal_snr=True))
    assert leaves(zero.semantic()) >= {"network.learned_variance", "diffusion.zero_terminal_snr"}
    # decides too, where anything is held out; checkpoints of before it could be do not have it
    assert leaves(replace(config, data=DataConfig(hold_out=20)).semantic()) == every - FREE - LATER | {"data.hold_out"}
    assert {field.name for field in fields(config)} >= FREE_SECTIONS


def test_a_free_field_leaves_the_semantic_config_as_it_was_and_another_is_named() -> None:
    free = read("--train.steps", "9", "--cluster.num_workers", "2", "--name", "y", "--train.accumulate", "2")
    assert free.semantic() == TrainConfig().semantic()
    other = read("--train.learning_rate", "0.002", "--network.channel_multipliers", "[1, 3]")
    assert differences(TrainConfig().semantic(), other.semantic()) == [
        "network.channel_multipliers: None -> [1, 3]",
        "train.learning_rate: 0.001 -> 0.002",
    ]
