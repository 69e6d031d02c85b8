"""The epsilon-network (Ho 2020, app. B): shapes, size, initialisation, dependence on every input."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.denoisers import FunctionDenoiser

from ddpm_core.config import UNetConfig
from ddpm_core.errors import ConfigError
from ddpm_core.likelihood.designs import full_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.likelihood.ode import ode_bpd
from ddpm_core.networks.unet import (
    Attention,
    UNet,
    Upsample,
    count_parameters,
    forward_flops,
    fourier_features,
    pixel_weights,
    timestep_embedding,
)
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import BetaTilde

SMALL = UNetConfig(
    image_size=8,
    in_channels=1,
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.0,
    num_groups=8,
)


def randomised(config):
    """A network whose zero-initialised convolutions are not zero, so that everything has an effect."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for p in unet.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=1 / math.sqrt(p[0].numel()))
    return unet


def test_ddpms_cifar10_network_has_its_published_size():
    """Ho 2020, app. B: 35.7 million parameters; 35,746,307 counted out."""
    assert count_parameters(UNet(UNetConfig())) == 35_746_307


def test_it_starts_at_zero():
    x = torch.randn(2, 1, 8, 8)
    assert not bool(UNet(SMALL)(x, torch.tensor([0, 5])).any())


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 1),
    st.sampled_from([1, 2]),
)
@settings(max_examples=20, deadline=None)
def test_any_size_that_halves(levels, rows, columns, channels, with_attention, heads):
    factor = 2 ** (levels - 1)
    size = (8 * rows * factor // 2 or 8, 4 * columns * factor)
    config = UNetConfig(
        image_size=size,
        in_channels=channels,
        base_channels=8,
        channel_multipliers=tuple(range(1, levels + 1)),
        num_res_blocks=1,
        attention_resolutions=(size[0] // factor,) * with_attention,
        num_heads=heads,
        num_groups=4,
    )
    x = torch.randn(2, channels, *size)
    out = randomised(config)(x, torch.tensor([0, 999]))
    assert out.shape == x.shape
    assert bool(out.isfinite().all())


@given(st.integers(1, 33), st.integers(1, 33), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_any_size_is_padded_to_what_the_levels_halve_and_cropped(height, width, levels):
    config = dataclasses.replace(
        SMALL, image_size=(height, width), channel_multipliers=(1,) * levels, attention_resolutions=()
    )
    factor = 2 ** (levels - 1)
    padded = config.padded_height_width
    assert all(
        side <= large < side + factor and large % factor == 0
        for side, large in zip((height, width), padded, strict=True)
    )
    unet = randomised(config)
    x = torch.randn(2, 1, height, width, requires_grad=True)
    out = unet(x, torch.tensor([0, 999]))
    assert out.shape == x.shape
    assert bool(out.isfinite().all())
    # a function of the image's own pixels, each of which counts, also at the edges
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert bool((gradient != 0).all())


def test_padding_is_that_of_the_network_of_the_padded_size():
    """Zeros around the image, of which nothing is seen in the output but the image's own place."""
    config = dataclasses.replace(SMALL, image_size=(5, 7), channel_multipliers=(1, 1, 2), attention_resolutions=(2,))
    whole = dataclasses.replace(config, image_size=(8, 8))
    unet, larger = randomised(config), randomised(whole)
    x, t = torch.randn(2, 1, 5, 7), torch.tensor([0, 999])
    expected = larger(torch.nn.functional.pad(x, (0, 1, 1, 2)), t)[:, :, 1:6, :7]
    assert torch.equal(unet(x, t), expected)


def test_likelihoods_of_a_padded_network_are_of_the_images_own_pixels():
    """ELBO and ODE call eps(x_t, t) on 3 x 5 pixels: equal to the network of 4 x 6 with the padding done outside."""
    config = dataclasses.replace(SMALL, image_size=(3, 5), attention_resolutions=(2,))
    unet, larger = randomised(config), randomised(dataclasses.replace(config, image_size=(4, 6)))

    def outside(x_t, t):
        return larger(torch.nn.functional.pad(x_t, (0, 1, 0, 1)), t)[:, :, :3, :5]

    process, ids = DiscreteProcess.linear(30), torch.arange(2)
    inside, outside = (
        FunctionDenoiser(lambda z, t, network=network: network(z.float(), t), process, (1, 3, 5))
        for network in (unet, outside)
    )
    images = torch.randint(0, 256, (2, 1, 3, 5), dtype=torch.uint8)
    ode, expected = (ode_bpd(denoiser, images, ids, seed=0, num_steps=8) for denoiser in (inside, outside))
    assert torch.equal(ode.bits_per_dim, expected.bits_per_dim)
    assert torch.equal(ode.trace_error, expected.trace_error)
    assert bool(ode.bits_per_dim.isfinite().all())
    design = full_design(30, 2)
    found, expected = (elbo(denoiser, images, ids, design, 0, BetaTilde()).terms for denoiser in (inside, outside))
    assert torch.equal(found, expected)
    assert bool(found.isfinite().all())


def test_attention_is_at_heights_of_the_padded_image():
    config = dataclasses.replace(SMALL, image_size=(30, 45), channel_multipliers=(1, 1, 1, 1), attention_resolutions=())
    assert dataclasses.replace(config, attention_resolutions=(32, 4)).padded_height_width == (32, 48)
    with pytest.raises(ConfigError, match=r"attention_resolutions: \(30,\) .* choose from \[32, 16, 8, 4\]"):
        dataclasses.replace(config, attention_resolutions=(30,))


def test_levels_that_would_mostly_compute_on_padding_are_refused():
    config = dataclasses.replace(SMALL, image_size=(1, 1), channel_multipliers=(1,) * 7, attention_resolutions=())
    assert config.padded_height_width == (64, 64)
    with pytest.raises(ConfigError, match=r"image_size: \(1, 1\) would be padded to 128 x 128 .* 8 levels; use fewer"):
        dataclasses.replace(config, channel_multipliers=(1,) * 8)
    assert dataclasses.replace(config, image_size=(1, 200), channel_multipliers=(1,) * 8).padded_height_width == (
        128,
        256,
    )


@pytest.mark.slow
def test_256_pixels():
    config = dataclasses.replace(
        SMALL, image_size=256, in_channels=3, channel_multipliers=(1,) * 6, attention_resolutions=(8,)
    )
    assert UNet(config)(torch.randn(1, 3, 256, 256), torch.tensor([1])).shape == (1, 3, 256, 256)


def test_the_output_depends_on_the_time_and_on_every_pixel():
    unet, x = randomised(SMALL), torch.randn(1, 1, 8, 8, requires_grad=True)
    out = unet(x, torch.tensor([3]))
    assert float((unet(x, torch.tensor([4])) - out).detach().abs().max()) > 1e-3
    # Attention makes even opposite corners see each other.
    (gradient,) = torch.autograd.grad(out[0, 0, 0, 0], x)
    assert bool((gradient != 0).all())


def test_every_parameter_gets_a_gradient():
    unet = randomised(SMALL)
    unet(torch.randn(2, 1, 8, 8), torch.tensor([3, 700])).square().sum().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None, name
        # A bias before a group norm over one channel group would be dead; none here is.
        assert float(p.grad.abs().max()) > 0, name


def test_rows_of_a_batch_do_not_mix():
    unet, x, t = randomised(SMALL), torch.randn(3, 1, 8, 8), torch.tensor([1, 50, 900])
    torch.testing.assert_close(unet(x, t)[1:2], unet(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)
    # On one batch shape a row's result does not depend on the other rows at all.
    other = torch.cat([torch.randn(1, 1, 8, 8), x[1:2], torch.randn(1, 1, 8, 8)])
    assert torch.equal(unet(other, t)[1], unet(x, t)[1])


def test_memory_format_does_not_change_the_result():
    unet, x, t = randomised(SMALL), torch.randn(2, 1, 8, 8), torch.tensor([1, 50])
    expected = unet(x, t)
    unet = unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(unet(x.to(memory_format=torch.channels_last), t), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_is_close_and_returns_float32():
    unet, x, t = randomised(SMALL), torch.randn(4, 1, 8, 8), torch.tensor([1, 50, 300, 999])
    expected = unet(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = unet(x, t)
    assert found.dtype == torch.float32
    relative = float((found - expected).norm().detach() / expected.norm().detach())
    assert 0.0 < relative < 0.05


def test_dropout_acts_in_training_only():
    unet = randomised(dataclasses.replace(SMALL, dropout=0.5))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 50])
    assert torch.equal(unet(x, t), unet(x, t))
    unet.train()
    assert not torch.equal(unet(x, t), unet(x, t))


def test_attention_is_softmax_of_scaled_products():
    """Vaswani 2017, eq. 1, written out for two heads."""
    torch.manual_seed(0)
    attention = Attention(8, num_heads=2, num_groups=2)
    torch.nn.init.normal_(attention.project.weight)
    x = torch.randn(2, 8, 3, 4)
    qkv = attention.qkv(attention.norm(x)).flatten(2)
    heads = []
    for head in range(2):
        q, k, v = (qkv[:, 8 * part + 4 * head : 8 * part + 4 * head + 4] for part in range(3))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 2.0, dim=-1)
        heads.append(torch.einsum("bij,bcj->bci", weights, v))
    expected = x + attention.project(torch.cat(heads, 1).reshape(2, 8, 3, 4))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(3, 4), (1, 1), (7, 2)])
def test_upsample_is_nearest_doubling_and_convolution(size):
    torch.manual_seed(0)
    upsample, x = Upsample(5).double(), torch.randn(2, 5, *size, dtype=torch.float64)
    expected = upsample.conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(upsample(x), expected, rtol=1e-12, atol=1e-12)


def test_timestep_embedding():
    """Vaswani 2017, sec. 3.5, in DDPM's order: sines, then cosines, frequencies 1 to 1e-4."""
    found = timestep_embedding(torch.tensor([0, 7]), 6)
    frequencies = [1.0, 1e-2, 1e-4]
    expected = [[0, 0, 0, 1, 1, 1], [math.sin(7 * w) for w in frequencies] + [math.cos(7 * w) for w in frequencies]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)
    assert timestep_embedding(torch.tensor([3]), 7).shape == (1, 7)


def test_config_round_trip():
    assert UNetConfig.from_dict(SMALL.to_dict()) == SMALL
    assert SMALL.height_width == (8, 8)
    with pytest.raises(ConfigError, match=r"network\.depth"):
        UNetConfig.from_dict({"depth": 3})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", (8, 0)),
        ("image_size", (8, -8)),
        ("in_channels", 5),
        ("base_channels", 20),
        ("base_channels", 0),
        ("channel_multipliers", ()),
        ("num_res_blocks", 0),
        ("attention_resolutions", (5,)),
        ("num_heads", 3),
        ("dropout", 1.0),
        ("num_groups", 0),
    ],
)
def test_a_bad_field_is_refused_by_name(field, value):
    name = "base_channels" if field == "num_heads" else field
    with pytest.raises(ConfigError, match=rf"network\.{name}"):
        dataclasses.replace(SMALL, **{field: value})


def test_another_image_shape_is_refused():
    with pytest.raises(ConfigError, match="x_t"):
        UNet(SMALL)(torch.zeros(1, 3, 8, 8), torch.tensor([0]))


def test_forward_flops_by_hand():
    """One level, one block each way: 2 x (weights of each convolution) x (positions), plus the linears."""
    config = UNetConfig(4, 1, 8, (1,), 1, (), dropout=0.0, num_groups=4)
    unet = UNet(config)
    convolutions = sum(m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Conv2d))
    linears = sum(m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * 2 * 16 * 16 * 8
    assert forward_flops(config) == 2 * 16 * convolutions + 2 * linears + attention


def test_pixel_weights_bound_the_multiply_adds() -> None:
    config = UNetConfig(8, 1, 32, (1, 2), 1, (4,), num_heads=4, dropout=0.0, num_groups=8)
    bound = pixel_weights(UNet(config))
    assert bound / 8 < forward_flops(config) / 2 < bound


def test_fourier_features_are_the_sines_and_cosines_of_the_paper():
    """Kingma 2021, VDM, app. C: sin and cos of 2^n 2 pi z for each n, exact where they are known."""
    z = torch.tensor([0.0, 1 / 16, 1 / 8, -1 / 4, 1.0, 1 / 127.5], dtype=torch.float64).reshape(1, 1, 2, 3)
    found = fourier_features(z, (0, 2, 7))
    assert found.shape == (1, 6, 2, 3)
    half = math.sqrt(0.5)
    for channel, expected in (
        (0, [0.0, math.sin(math.pi / 8), half, -1.0, 0.0, math.sin(2 * math.pi / 127.5)]),
        (1, [0.0, 1.0, 0.0, 0.0, 0.0, math.sin(8 * math.pi / 127.5)]),
        (2, [0.0, 0.0, 0.0, 0.0, 0.0, math.sin(256 * math.pi / 127.5)]),
        (3, [1.0, math.cos(math.pi / 8), half, 0.0, 1.0, math.cos(2 * math.pi / 127.5)]),
        (4, [1.0, 0.0, -1.0, 1.0, 1.0, math.cos(8 * math.pi / 127.5)]),
        (5, [1.0, 1.0, 1.0, 1.0, 1.0, math.cos(256 * math.pi / 127.5)]),
    ):
        expected = torch.tensor(expected, dtype=torch.float64).reshape(2, 3)
        torch.testing.assert_close(found[0, channel], expected, rtol=0, atol=1e-12)
    # Of several channels, each has its own.
    two = torch.cat([z, z.flip(3)], 1)
    whole = fourier_features(two, (1, 3)).reshape(1, 4, 2, 2, 3)
    assert torch.equal(whole[:, :, 0], fourier_features(z, (1, 3)))
    assert torch.equal(whole[:, :, 1], fourier_features(z.flip(3), (1, 3)))


def test_fourier_features_are_further_input_channels_and_of_the_images_own_pixels():
    """In float32 also under autocast, and zero where a network pads: the padded network sees the same."""
    config = dataclasses.replace(SMALL, image_size=(5, 7), attention_resolutions=(3,), fourier_features=(2, 7))
    unet, seen = randomised(config), []
    assert unet.conv_in.weight.shape[1] == 5
    unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, t = torch.rand(2, 1, 5, 7) * 2 - 1, torch.tensor([0.0, 999.5], dtype=torch.float64)
    plain = unet(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = unet(x, t)
    assert seen[0].dtype == seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])
    features = torch.cat([x, fourier_features(x, (2, 7))], 1)
    assert torch.equal(seen[0], torch.nn.functional.pad(features, (0, 1, 0, 1)))
    assert plain.dtype == half.dtype == torch.float32
    assert not torch.equal(plain, half)
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0.1 * float(plain.abs().max()))


def test_learned_variances_have_as_many_further_channels():
    config = dataclasses.replace(SMALL, in_channels=3, learned_variance=True)
    assert randomised(config)(torch.randn(2, 3, 8, 8), torch.tensor([0, 5])).shape == (2, 6, 8, 8)


def test_new_fields_are_stored_only_where_they_are_used():
    assert not {"fourier_features", "learned_variance"} & SMALL.to_dict().keys()
    config = dataclasses.replace(SMALL, fourier_features=(6, 7), learned_variance=True)
    assert config.to_dict()["fourier_features"] == [6, 7]
    assert config.to_dict()["learned_variance"] is True
    assert UNetConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("exponents", [(-1,), (17,), (3, 2), (2, 2), (True,), (6, 7, 7)])
def test_bad_fourier_exponents_are_refused(exponents):
    with pytest.raises(ConfigError, match=r"^network\.fourier_features: .*rising whole numbers in 0\.\.16"):
        dataclasses.replace(SMALL, fourier_features=exponents)


LABELLED = dataclasses.replace(SMALL, num_classes=3)


def test_a_label_is_added_to_the_time_and_the_null_class_is_the_last_row():
    """Ho and Salimans 2021, sec. 3.2: one network for eps(z, c) and eps(z), whose null class is a further label."""
    torch.manual_seed(0)
    plain = UNet(SMALL)
    torch.manual_seed(0)
    unet = UNet(LABELLED).eval()
    shared = dict(unet.named_parameters())
    table = shared.pop("class_embedding.weight")
    assert table.shape == (4, 4 * SMALL.base_channels)
    # What is there without labels too begins as it does there.
    assert all(torch.equal(value, shared[name]) for name, value in plain.named_parameters())
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 7)
        out = unet(x[:1].expand(4, -1, -1, -1), t, torch.tensor([0, 1, 2, -1]))
        assert len({tuple(row.flatten().tolist()) for row in out}) == 4
        assert torch.equal(unet(x, t), unet(x, t, torch.full((4,), -1)))
        plain.load_state_dict({name: value for name, value in unet.state_dict().items() if name in shared})
        plain.eval()
        assert not torch.equal(plain(x, t), unet(x, t))
        unet.class_embedding.weight[3].zero_()
        torch.testing.assert_close(plain(x, t), unet(x, t))


def test_classes_in_the_configuration():
    assert "num_classes" not in SMALL.to_dict()
    assert LABELLED.to_dict()["num_classes"] == 3
    assert UNetConfig.from_dict(LABELLED.to_dict()) == LABELLED
    for wrong in (0, -1, 10**7):
        with pytest.raises(ConfigError, match=r"network\.num_classes"):
            dataclasses.replace(SMALL, num_classes=wrong)
