"""What a configuration leaves open: what is validated on and held out, on a new run and on one that goes on."""

from dataclasses import replace
from typing import Any

import pytest

from pipelines.cli.config import as_dict, differences, parse
from pipelines.cli.errors import CheckpointError, ConfigError
from pipelines.cluster import precision
from pipelines.cluster.precision import Bf16
from pipelines.models.checkpoints import Checkpoint
from pipelines.storage.location import Location
from pipelines.training.complete import complete
from pipelines.training.config import DIGITS_TEST, TrainConfig


def settle(dataset, *argv: str, newest: Checkpoint | None = None):
    """(validation, hold_out) and what is said of it."""
    config, lines = complete(parse(TrainConfig, argv, "Train."), dataset, newest)
    assert None not in (config.network.base_channels, config.network.num_groups, config.data.hold_out)
    return (config.data.validation, config.data.hold_out), lines[0]


def checkpoint(config: TrainConfig) -> Checkpoint:
    return Checkpoint(Location.parse("/run/checkpoints/step-00000100"), {"step": 100, "config": config.semantic()})


PHOTOS = ("--data.train", "/photos")


@pytest.mark.parametrize(
    ("rows", "argv", "settled", "said"),
    [
        (100, (), (DIGITS_TEST, 0), "validation: embedded://digits/test"),
        (100, ("--data.hold_out", "10"), ("held-out", 10), "held out: 10 of the 100 rows"),
        (
            100,
            PHOTOS,
            ("held-out", 20),
            "held out: 5 of the 100 rows of /photos, one of every 20; they are never",
        ),
        (25, PHOTOS, ("held-out", 20), "held out: 1 of the 25 rows"),
        (19, PHOTOS, (None, 0), "no validation: 19 row(s) are too few"),
        (1, PHOTOS, (None, 0), "no validation: 1 row(s) are too few"),
        (100, (*PHOTOS, "--data.validation", "null"), (None, 0), "validation: none"),
        (100, (*PHOTOS, "--data.validation", "/test"), ("/test", 0), "validation: /test"),
        (100, (*PHOTOS, "--data.validation", "/test", "--data.hold_out", "5"), ("/test", 5), "held out: 20 of the 100"),
        (100, (*PHOTOS, "--data.hold_out", "0"), (None, 0), "no validation"),
        (100, ("--data.validation", "held-out"), ("held-out", 20), "held out: 5 of the 100 rows of embedded://digits"),
    ],
)
def test_what_is_held_out_of_a_new_run(make_dataset, rows, argv, settled, said) -> None:
    found, line = settle(make_dataset(rows), *argv)
    assert found == settled
    assert line.startswith(said)


def test_a_resumed_run_keeps_its_rule_its_network_and_its_rows(make_dataset) -> None:
    dataset = make_dataset(100)
    config = parse(TrainConfig, [*PHOTOS, "--data.hold_out", "7", "--network.base_channels", "16"], "")
    config, _ = complete(config, dataset, None)
    again, _ = complete(parse(TrainConfig, PHOTOS, ""), dataset, checkpoint(config))
    assert (again.data, again.network) == (config.data, config.network)
    assert again.semantic() == config.semantic()
    # another validation set alone changes nothing of what is learned; another rule does
    other, _ = complete(parse(TrainConfig, [*PHOTOS, "--data.validation", "/test"], ""), dataset, checkpoint(config))
    assert (other.data.validation, other.data.hold_out) == ("/test", 7)
    assert other.semantic() == config.semantic()
    changed, _ = complete(parse(TrainConfig, [*PHOTOS, "--data.hold_out", "8"], ""), dataset, checkpoint(config))
    assert differences(config.semantic(), changed.semantic()) == ["data.hold_out: 7 -> 8"]


# What a checkpoint of the default training recorded before fields could be left open.
VERSION_1: dict[str, Any] = {
    "data": {"random_flip": False, "window_mib": 64},
    "network": {
        "base_channels": 32,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "num_heads": 4,
        "num_groups": 8,
        "dropout": 0.0,
    },
    "diffusion": {
        "schedule": "linear",
        "num_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "betas": None,
    },
    "train": {
        "batch_size": 64,
        "loss": "simple",
        "min_snr_gamma": 5.0,
        "optimizer": "adam",
        "learning_rate": 0.001,
        "warmup_steps": 100,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "ema_decay": 0.999,
        "precision": "fp32",
        "seed": 0,
    },
}


@pytest.mark.parametrize("resumed", [True, False])
def test_the_default_training_is_the_one_it_always_was(make_dataset, resumed: bool) -> None:
    newest = Checkpoint(Location.parse("/run"), {"step": 100, "config": VERSION_1}) if resumed else None
    argv = [] if resumed else ["--precision", "fp32"]
    assert complete(parse(TrainConfig, argv, ""), make_dataset(100), newest)[0].semantic() == VERSION_1


def test_a_run_of_before_anything_could_be_held_out_goes_on_without(make_dataset) -> None:
    """Its checkpoint has every field of the network, and no word of `hold_out`."""
    dataset = make_dataset(100)
    config, _ = complete(TrainConfig(), dataset, None)
    assert "hold_out" not in config.semantic()["data"]
    assert settle(dataset, newest=checkpoint(config))[0] == (DIGITS_TEST, 0)
    found, line = settle(dataset, *PHOTOS, newest=checkpoint(config))
    assert found == (None, 0)
    assert line == "no validation: the run holds out no rows; name a data set with --data.validation"


def test_the_settled_configuration_is_a_recipe_of_the_same_training(make_dataset, tmp_path) -> None:
    dataset = make_dataset(100)
    config, _ = complete(parse(TrainConfig, PHOTOS, ""), dataset, None)
    recipe = Location.parse(tmp_path / "config.json")
    recipe.write_json(as_dict(config))
    again, _ = complete(parse(TrainConfig, ["--config", recipe.path], ""), dataset, None)
    assert again == config


def test_too_few_rows_are_refused_where_they_were_asked_for(make_dataset) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation = 'held-out': holds out none of 12 rows"):
        settle(make_dataset(12), *PHOTOS, "--data.validation", "held-out")
    with pytest.raises(ConfigError, match=r"holds out none of 12 rows; give a data\.hold_out that is at most 12"):
        settle(make_dataset(12, name="other"), *PHOTOS, "--data.hold_out", "13")


def test_precision_is_settled_and_kept_on_any_machine(make_dataset, monkeypatch) -> None:
    dataset = make_dataset(100)
    monkeypatch.setattr(precision, "bf16_of_cpu", lambda: Bf16("AMX"))
    config, lines = complete(TrainConfig(), dataset, None)
    assert config.precision == config.semantic()["train"]["precision"] == "bf16"
    assert any(line.startswith("precision: bf16 (this CPU (") for line in lines)
    monkeypatch.setattr(precision, "bf16_of_cpu", lambda: Bf16("none", "11"))
    assert complete(TrainConfig(), dataset, None)[0].precision == "fp32"
    again, _ = complete(TrainConfig(), dataset, checkpoint(config))
    assert again.semantic() == config.semantic()
    other, _ = complete(parse(TrainConfig, ["--precision", "fp32"], ""), dataset, checkpoint(config))
    assert differences(config.semantic(), other.semantic()) == ["precision: 'bf16' -> 'fp32'"]
    on_gpu, _ = complete(parse(TrainConfig, ["--cluster.gpus_per_worker=1"], ""), dataset, None)
    assert on_gpu.precision == "bf16"


@pytest.mark.parametrize(
    "damage", [{"network": {"base_channels": "x"}}, {"data": 3}, {"data": {"hold_out": "many"}}, {"train": "x"}]
)
def test_a_damaged_checkpoint_is_named(make_dataset, damage) -> None:
    config, _ = complete(TrainConfig(), make_dataset(100), None)
    damaged = checkpoint(config)
    damaged = replace(damaged, state={**damaged.state, "config": {**damaged.state["config"], **damage}})
    with pytest.raises(CheckpointError, match=rf"state\.json: config\.{next(iter(damage))} = .* is damaged"):
        complete(TrainConfig(), make_dataset(100, name="again"), damaged)
