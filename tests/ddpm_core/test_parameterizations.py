"""What a network may predict: Ho 2020; Salimans and Ho 2022 (v); Kingma 2021, VDM; Karras 2022, EDM, table 1."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.denoisers import GreyWorld
from support.processes import PROCESSES as TABLES

from ddpm_core.config import UNetConfig
from ddpm_core.errors import ConfigError, ModelError
from ddpm_core.model import model_bytes, model_from_bytes
from ddpm_core.parameterizations import DENOISERS, SIGMA_DATA, denoiser_named
from ddpm_core.process.base import factor, q_sample
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess

NETWORK = UNetConfig(
    image_size=4, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=4,
)  # fmt: skip
VDM, EDM = ContinuousProcess.linear(), ContinuousProcess.edm()
LEARNED = (ContinuousProcess.learned(), ContinuousProcess.learned(learned_ends=True))
ZERO_TERMINAL = DiscreteProcess.linear(20, 0.01, 0.3).rescaled_to_zero_terminal_snr()
WORLD = GreyWorld((0, 60, 128, 255), (0.4, 0.1, 0.2, 0.3))
LINEAR = ("eps", "x_0", "v", "residual_eps", "edm")


def built(kind, process, network=NETWORK):
    torch.manual_seed(0)
    denoiser = denoiser_named(kind).build(network, process)
    for parameter in denoiser.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.eval()


def karras(marginal):
    """c_skip, c_out and c_in of Karras 2022, table 1, at sigma_data = 0.5."""
    sigma = marginal.sigma / marginal.alpha
    total = sigma**2 + 0.25
    return 0.25 / total, sigma * 0.5 / total**0.5, 1 / total**0.5


def target(kind, z, marginal, x_0, eps):
    """What the network would have to say, in the terms of its paper, so that `x_0` and `eps` follow."""
    if kind == "edm":
        c_skip, c_out, _ = karras(marginal)
        return (x_0 - c_skip * z / marginal.alpha) / c_out
    v = marginal.alpha * eps - marginal.sigma * x_0
    return {"eps": eps, "x_0": x_0, "v": v, "residual_eps": eps - z}[kind]


READERS = {kind: built(kind, VDM) for kind in LINEAR}


def test_they_have_names():
    assert set(DENOISERS) == set(LINEAR)
    for name in ("velocity", "", "EPS"):
        with pytest.raises(ConfigError, match=rf"^denoiser: '{name}' is not one of \['edm', 'eps'"):
            denoiser_named(name)


@given(st.floats(-13.3, 5.0), st.sampled_from(["preserving", "edm", *TABLES]), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_all_say_the_same_of_the_exact_denoiser(gamma, name, seed):
    """The best x_0 of a world of grey levels, said in five ways, at any log-SNR and in any family."""
    time = torch.full((6,), gamma, dtype=torch.float64)
    if name in TABLES:
        marginal = TABLES[name].at(torch.arange(6) * 11)
    else:
        marginal = (VDM if name == "preserving" else EDM).at(time)
    g = torch.Generator().manual_seed(seed)
    x_0 = WORLD.images(6, seed).double() / 127.5 - 1
    z = q_sample(marginal, x_0, torch.randn(6, 1, 2, 2, generator=g, dtype=torch.float64))
    best = WORLD.best_x_0(z, marginal)
    eps = (z - marginal.alpha * best) / marginal.sigma
    size = (marginal.alpha**2 + marginal.sigma**2).sqrt() * 10
    for kind, reader in READERS.items():
        found = reader.read(z, marginal, target(kind, z, marginal, best, eps))
        # Each in units of z: a conversion loses as many digits as what it looks for is smaller.
        assert bool(((found.x_0 - best).abs() * marginal.alpha <= 1e-13 * size).all()), kind
        assert bool(((found.eps - eps).abs() * marginal.sigma <= 1e-13 * size).all()), kind
        assert found.holds == reader.holds


@pytest.mark.parametrize("process", [VDM, EDM, *TABLES.values()], ids=["vdm", "edm", *TABLES])
@pytest.mark.parametrize("kind", LINEAR)
def test_the_network_is_called_as_its_paper_says(kind, process):
    """c_in y for EDM, z for the others, with the process's conditioning; and its output read as `target` is written."""
    denoiser = built(kind, process)
    time = torch.tensor([0, 30, 59]) if isinstance(process, DiscreteProcess) else process.grid(3).flip(0)
    marginal, g = process.at(time), torch.Generator().manual_seed(1)
    z = q_sample(marginal, *torch.randn(2, 3, 1, 4, 4, generator=g, dtype=torch.float64))
    seen = z * karras(marginal)[2] / marginal.alpha if kind == "edm" else z
    with torch.no_grad():
        found, output = denoiser(z, time), denoiser.network(seen.float(), process.conditioning(time)).double()
    close = {"rtol": 1e-4, "atol": 1e-4}  # the network computes in float32
    wanted = target(kind, z, marginal, found.x_0, found.eps)
    scale = output.abs().amax((1, 2, 3), True).clamp(min=1e-3)
    torch.testing.assert_close(wanted / scale, output / scale, **close)
    assert found.held.dtype == torch.float64
    single = denoiser(z.float(), time)
    assert single.held.dtype == torch.float32
    assert bool(single.x_0.isfinite().all())


@pytest.mark.parametrize("process", [VDM, EDM, *TABLES.values()], ids=["vdm", "edm", *TABLES])
@pytest.mark.parametrize("kind", LINEAR)
def test_the_target_weight_turns_the_error_of_what_is_held_into_that_of_the_output(kind, process):
    """Salimans and Ho 2022, sec. 4: the loss on v is (SNR + 1) times that on x_0; Karras 2022: 1 / c_out^2."""
    denoiser = built(kind, process)
    time = torch.tensor([0, 5, 30, 59]) if isinstance(process, DiscreteProcess) else process.grid(4)
    marginal, g = process.at(time), torch.Generator().manual_seed(2)
    z, one, two = torch.randn(3, 4, 1, 4, 4, generator=g, dtype=torch.float64)
    held = denoiser.read(z, marginal, one).held - denoiser.read(z, marginal, two).held
    weight = denoiser.target_weight(marginal)
    torch.testing.assert_close(weight * held.square(), (one - two).square(), rtol=1e-6, atol=1e-9)
    snr = marginal.alpha**2 / marginal.sigma**2
    if kind == "v" and process is VDM:
        torch.testing.assert_close(weight, snr + 1, rtol=1e-9, atol=0)
    if kind == "edm":
        sigma2 = 1 / snr
        torch.testing.assert_close(weight, (sigma2 + 0.25) / (sigma2 * 0.25), rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", [VDM, EDM], ids=["preserving", "exploding"])
def test_edms_network_has_inputs_and_targets_of_variance_1(process):
    """Karras 2022, app. B.6, for data of standard deviation sigma_data; a network that is 0 has a loss of 1 then."""
    assert SIGMA_DATA == 0.5
    n, denoiser, g = 100_000, built("edm", process), torch.Generator().manual_seed(0)
    for gamma in process.grid(5):
        marginal = process.at(gamma[None].expand(n))
        x_0, eps = torch.randn(2, n, 1, 1, 1, generator=g, dtype=torch.float64)
        x_0 = 0.5 * x_0
        z = q_sample(marginal, x_0, eps)
        wanted = target("edm", z, marginal, x_0, eps)
        error = 4 * (2 / n) ** 0.5
        assert float(denoiser.scaled(z, marginal).var()) == pytest.approx(1.0, rel=error)
        assert float(wanted.var()) == pytest.approx(1.0, rel=error)
        zero = denoiser.read(z, marginal, torch.zeros_like(z))
        loss = denoiser.target_weight(marginal) * (x_0 - zero.x_0).square()
        assert float(loss.mean()) == pytest.approx(1.0, rel=error)


@pytest.mark.parametrize("kind", ["eps", "residual_eps"])
def test_eps_is_refused_where_it_says_nothing(kind):
    """Lin 2024, sec. 3.1."""
    with pytest.raises(ConfigError, match=r"^schedule\.zero_terminal_snr: True .*predict v or x_0$"):
        built(kind, ZERO_TERMINAL)


@pytest.mark.parametrize("kind", ["x_0", "v", "edm"])
def test_x_0_v_and_edm_are_finite_at_zero_terminal_snr(kind):
    denoiser, g = built(kind, ZERO_TERMINAL), torch.Generator().manual_seed(0)
    z, t = torch.randn(3, 1, 4, 4, generator=g), torch.tensor([0, 18, 19])
    found = denoiser(z, t)
    for value in (found.x_0, found.eps, found.v, found.clipped().eps):
        assert bool(value.isfinite().all())
    torch.testing.assert_close(found.eps[2], z[2])
    assert bool(denoiser.target_weight(found.marginal).isfinite().all())


@pytest.mark.parametrize("kind", LINEAR)
def test_learned_variances_are_the_second_half_of_the_channels(kind):
    """Nichol and Dhariwal 2021, sec. 3.1: f = (v + 1) / 2, and the first half means what it does without them."""
    process = TABLES["preserving"]
    denoiser = built(kind, process, replace(NETWORK, in_channels=2, learned_variance=True))
    assert denoiser.learns_variance
    z, t = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 30, 59])
    with torch.no_grad():
        found, marginal = denoiser(z, t), process.at(t)
        output = denoiser.network(denoiser.scaled(z, marginal).float(), t).double()
    torch.testing.assert_close(found.variance_fraction, (output[:, 2:] + 1) / 2)
    torch.testing.assert_close(found.held, denoiser.read(z, marginal, output[:, :2]).held)
    rows = torch.tensor([2, 0])
    assert torch.equal(found[rows].variance_fraction, found.variance_fraction[rows])
    assert torch.equal(found.clipped().variance_fraction, found.variance_fraction)
    plain = built(kind, process)
    assert not plain.learns_variance
    assert plain(torch.randn(1, 1, 4, 4), torch.tensor([3])).variance_fraction is None


@pytest.mark.parametrize("process", [VDM, EDM], ids=["preserving", "exploding"])
def test_learned_variances_without_a_beta_are_refused(process):
    with pytest.raises(ConfigError, match=r"^network\.learned_variance: True needs a process of discrete time"):
        built("eps", process, replace(NETWORK, learned_variance=True))


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_extreme_outputs_stay_numbers_in_either_precision(kind, size):
    """Outputs of 1e4, in bf16 as well: finite; where float32 ends, x_0 overflows to infinity, never to nan."""
    for process in (VDM, EDM, TABLES["preserving"]):
        for precision in ("fp32", "bf16"):
            denoiser = built(kind, process).in_precision(precision)
            torch.nn.init.zeros_(denoiser.network.conv_out.weight)
            torch.nn.init.constant_(denoiser.network.conv_out.bias, size)
            time = torch.tensor([0, 30, 59]) if isinstance(process, DiscreteProcess) else process.grid(3)
            z = factor(process.at(time).sigma, torch.zeros(1)) * torch.randn(3, 1, 4, 4)
            found = denoiser(z, time)
            clipped = found.clipped()
            assert bool((clipped.x_0.abs() <= 1.0).all())
            assert bool(clipped.eps.isfinite().all())
            if size == 1e4:
                assert bool(found.x_0.isfinite().all())
                assert bool(found.eps.isfinite().all())


@pytest.mark.parametrize("process", [VDM, *LEARNED, EDM], ids=["vdm", "learned", "learned-ends", "edm"])
@pytest.mark.parametrize("kind", LINEAR)
def test_a_model_of_each_kind_comes_back_from_disk(kind, process):
    """Its gamma and ends among the weights; a model of eps without a name, as all were before there were others."""
    denoiser = built(kind, process, replace(NETWORK, fourier_features=(2, 7)))
    files = model_bytes(denoiser.named_weights(), denoiser, {"step": 3})
    config = json.loads(files["config.json"])
    assert config.get("denoiser") == (None if kind == "eps" else kind)
    assert config["network"]["fourier_features"] == [2, 7]
    with torch.no_grad():
        for parameter in process.parameters():
            parameter.add_(0.25)  # what is on disk is what was written
    loaded = model_from_bytes(files).denoiser
    with torch.no_grad():
        for parameter in process.parameters():
            parameter.sub_(0.25)
    assert type(loaded) is type(denoiser)
    assert loaded.to_config() == denoiser.to_config()
    assert loaded.process.ends == process.ends
    places = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(loaded.process.gamma(places), process.gamma(places), rtol=1e-6, atol=1e-6)
    z, time = torch.randn(2, 1, 4, 4), process.grid(2).detach()
    torch.testing.assert_close(loaded(z, time).held, denoiser(z, time).held, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    names = denoiser.named_weights().keys() - dict(denoiser.network.named_parameters()).keys()
    assert names == {f"process.schedule.{name}" for name, _ in process.schedule.named_parameters()}


def test_zero_terminal_models_come_back_from_disk():
    denoiser = built("v", ZERO_TERMINAL)
    loaded = model_from_bytes(model_bytes(denoiser.named_weights(), denoiser, {})).denoiser
    assert torch.equal(loaded.process.alpha, ZERO_TERMINAL.alpha)
    config = json.loads(model_bytes(denoiser.named_weights(), denoiser, {})["config.json"])
    assert config["schedule"]["zero_terminal_snr"] is True


def test_a_model_on_disk_that_cannot_be_is_refused():
    """eps with zero-terminal SNR, however it came into the file."""
    denoiser = built("v", ZERO_TERMINAL)
    files = model_bytes(denoiser.named_weights(), denoiser, {})
    config = json.loads(files["config.json"])
    config["denoiser"] = "eps"
    del config["config_sha256"]
    text = json.dumps(config, sort_keys=True, allow_nan=False)
    config["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    files["config.json"] = json.dumps(config).encode()
    with pytest.raises(ModelError, match="zero_terminal_snr"):
        model_from_bytes(files)
