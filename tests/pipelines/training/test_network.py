"""The network's fields that are not given: chosen for the images, and always a network that takes them."""

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_core.networks.unet import UNet, count_parameters
from pipelines.cli.errors import ConfigError
from pipelines.training.network import NetworkConfig

sides = st.integers(1, 300)


def test_the_digits_network_is_the_one_it_always_was() -> None:
    """Base 32, two levels, attention at 4, 4 heads, 8 groups: runs and models of version 1 go on with it."""
    assert NetworkConfig().for_images((8, 8, 1)) == NetworkConfig(32, (1, 2), 1, (4,), 4, 8, 0.0)


@pytest.mark.parametrize(
    ("shape", "multipliers", "attention", "millions"),
    [
        # the rows of the table in docs/jobs/train.md
        ((1, 1, 3), (1,), (1,), 0.18),
        ((16, 16, 3), (1, 2), (8,), 0.70),
        ((28, 28, 1), (1, 2, 2), (7,), 1.1),
        ((32, 32, 3), (1, 2, 2), (8,), 1.1),
        ((45, 30, 3), (1, 2, 2), (12,), 1.1),
        ((64, 64, 3), (1, 2, 2, 2), (8,), 1.5),
        ((128, 128, 3), (1, 1, 2, 2, 4), (8,), 3.3),
        ((256, 256, 3), (1, 1, 2, 2, 4, 4), (8,), 4.9),
    ],
)
def test_levels_and_attention_follow_the_size(shape, multipliers, attention, millions) -> None:
    network = NetworkConfig().for_images(shape)
    assert (network.channel_multipliers, network.attention_resolutions) == (multipliers, attention)
    assert (network.base_channels, network.num_res_blocks, network.num_heads, network.num_groups) == (32, 1, 4, 8)
    with torch.device("meta"):
        assert count_parameters(UNet(network.unet_config(shape))) == pytest.approx(millions * 1e6, rel=0.03)


@given(sides, sides, st.integers(1, 4), st.none() | st.integers(1, 6), st.none() | st.integers(2, 40))
@settings(deadline=None)
def test_what_is_chosen_fits_any_images_and_what_is_given(height, width, channels, levels, base) -> None:
    multipliers = None if levels is None else tuple(range(1, levels + 1))
    network = NetworkConfig(base_channels=base, channel_multipliers=multipliers)
    config = network.unet_config((height, width, channels))
    assert config.height_width == (height, width)
    assert base in (None, config.base_channels)
    assert multipliers in (None, config.channel_multipliers)


def test_a_group_of_one_value_is_refused_where_it_is_given_and_not_chosen() -> None:
    """Group norm of one value is 0 whatever the image: PyTorch fails on it in batches of one."""
    config = NetworkConfig(base_channels=8).unet_config((1, 1, 1))
    assert config.num_groups == 4
    UNet(config)(torch.zeros(1, 1, 1, 1), torch.tensor([0]))
    with pytest.raises(ConfigError, match=r"network\.num_groups = 8: leaves one value to each group at 1 x 1 pixels"):
        NetworkConfig(base_channels=8, num_groups=8).unet_config((1, 1, 1))


def test_a_training_that_goes_on_keeps_its_network_where_nothing_else_is_given() -> None:
    begun_with = {**asdict(NetworkConfig().for_images((8, 8, 1))), "channel_multipliers": [1, 3], "num_groups": 16}
    found = NetworkConfig(num_groups=8).for_images((28, 28, 1), begun_with)
    assert found == replace(NetworkConfig(32, (1, 3), 1, (4,), 4, 8))


def test_the_choice_is_told_in_one_line() -> None:
    assert NetworkConfig().describe((45, 30, 3)) == (
        "network for images of 45 x 30 pixels, padded to 48 x 32 inside the network: base_channels 32, "
        "channel_multipliers [1, 2, 2], num_res_blocks 1, attention_resolutions [12], num_heads 4, num_groups 8"
    )
    assert NetworkConfig().describe((8, 8, 1)).startswith("network for images of 8 x 8 pixels: base_channels 32,")
