"""Learned variances (Nichol and Dhariwal 2021, secs. 3.1, 3.3): L_vlb, L_hybrid, and a model from training to bits."""

import math
from dataclasses import replace

import pytest
import torch
from support.denoisers import toy_eps

from ddpm_core import counter_random
from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import Prediction
from ddpm_core.likelihood.bounds import bound_of
from ddpm_core.likelihood.designs import full_design
from ddpm_core.likelihood.elbo import elbo
from ddpm_core.model import model_bytes, model_from_bytes
from ddpm_core.objectives import objective_named
from ddpm_core.objectives.learned_variance import Hybrid, LearnedVlb
from ddpm_core.objectives.times import HISTORY, ImportanceTimes, UniformTimes
from ddpm_core.parameterizations import DENOISERS, denoiser_named
from ddpm_core.process.base import q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Learned
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddpm import DDPM

LN2 = math.log(2)
NETWORK = UNetConfig(
    image_size=4, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), dropout=0.0, num_groups=4, learned_variance=True,
)  # fmt: skip
PROCESS = DiscreteProcess.linear(12, 0.01, 0.3)
T = 12


def built(kind="eps", process=PROCESS):
    torch.manual_seed(0)
    denoiser = denoiser_named(kind).build(NETWORK, process)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return denoiser


def draw(n=T):
    g = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 256, (n, 1, 4, 4), generator=g).to(torch.uint8)
    return levels, (levels / 127.5 - 1.0), torch.randn(levels.shape, generator=g)


@pytest.mark.parametrize("kind", sorted(DENOISERS))
def test_l_vlb_over_uniform_times_is_the_elbos_sum(kind, monkeypatch):
    """Of one image and noise at every t: the mean over t of what is trained is what is evaluated, L_0 included."""
    denoiser = built(kind).eval()
    levels, _, eps = draw(1)
    t, every = torch.arange(T), (T, -1, -1, -1)
    objective = objective_named("vlb", denoiser)
    assert isinstance(objective, LearnedVlb)
    with torch.no_grad():
        rows = objective.at(denoiser, (levels / 127.5 - 1.0).expand(every), t, eps.expand(every))
    monkeypatch.setattr(counter_random, "normal", lambda seed, stream, ids, t, shape, dtype: eps[ids * 0].to(dtype))
    made = bound_of(denoiser)
    found = elbo(made.denoiser, levels, torch.arange(1), full_design(T, 1), 0, made.variance, batch_size=T)
    assert made.name == "learned"
    torch.testing.assert_close(rows.double() / T, found.terms[0] * LN2, rtol=2e-4, atol=1e-5)
    assert float(rows.mean()) == pytest.approx(float(found.terms.sum()) * LN2, rel=1e-4)


def of_leaves(mean, fraction, process=PROCESS):
    def denoise(z_t, time, label=None):
        return replace(Prediction.of_eps(z_t, process.at(time), mean), variance_fraction=fraction)

    return denoise


def test_the_hybrid_is_simple_for_the_mean_and_vlb_for_the_variances():
    """Nichol and Dhariwal 2021, eq. 16: L_simple + 0.001 L_vlb, the mean detached in L_vlb."""
    _, x_0, eps = draw()
    t = torch.arange(T)
    mean = toy_eps(q_sample(PROCESS.at(t), x_0, eps), t).requires_grad_()
    fraction = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    denoiser = built()
    hybrid = objective_named("hybrid", denoiser)
    assert isinstance(hybrid, Hybrid)
    vlb, denoise = objective_named("vlb", denoiser), of_leaves(mean, fraction)
    rows = hybrid.at(denoise, x_0, t, eps)
    simple = (mean - eps).square().flatten(1).mean(1)
    bound = vlb.at(denoise, x_0, t, eps)
    torch.testing.assert_close(rows, simple + 0.001 * bound)
    of_mean, of_fraction = torch.autograd.grad(rows.mean(), [mean, fraction])
    (of_simple,) = torch.autograd.grad(simple.mean(), mean)
    torch.testing.assert_close(of_mean, of_simple)
    vlb_of_mean, vlb_of_fraction = torch.autograd.grad(bound.mean(), [mean, fraction])
    torch.testing.assert_close(of_fraction, 0.001 * vlb_of_fraction)
    assert float(vlb_of_mean.abs().max()) > 0.0  # L_vlb itself trains the mean


def test_the_vlb_draws_times_by_importance_and_weights_them_back():
    _, x_0, eps = draw(24)
    denoiser = built()
    objective = objective_named("vlb", denoiser)
    assert isinstance(objective.times, ImportanceTimes)
    assert objective.remembers
    assert not objective.even
    uniforms = (torch.arange(24, dtype=torch.float64) + 0.5) / 24
    first = objective(denoiser, x_0, uniforms, eps)
    torch.testing.assert_close(first.rows, first.values)
    assert not first.values.requires_grad
    # Everything is known: where losses were large, times are drawn and counted less.
    for _ in range(HISTORY):
        objective.observe(torch.arange(T), torch.linspace(1, 10, T))
    then = objective(denoiser, x_0, uniforms, eps)
    p = objective.times.probabilities
    torch.testing.assert_close(then.rows.double(), then.values.double() / (T * p[then.time]), rtol=1e-5, atol=0)
    assert float(then.time.double().mean()) > float(first.time.double().mean())
    assert {name.removeprefix("times.") for name in objective.state_dict()} == {"history", "count"}
    again = objective_named("vlb", denoiser)
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(denoiser, x_0, uniforms, eps).rows, then.rows)
    plain = objective_named("hybrid", denoiser)
    assert isinstance(plain.times, UniformTimes)
    assert not plain.state_dict()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_outputs_give_an_infinite_loss_or_a_number_but_never_nan(size):
    """Values and variances of 1e4 are numbers; beyond float64's range the loss is infinite, which training refuses."""
    _, x_0, eps = draw()
    t = torch.arange(T)
    for sign in (-1, 1):
        for mean in (torch.zeros_like(x_0), torch.full_like(x_0, size)):
            denoise = of_leaves(mean, torch.full_like(x_0, sign * size))
            for name in ("vlb", "hybrid"):
                rows = objective_named(name, built()).at(denoise, x_0, t, eps)
                assert not bool(rows.isnan().any()), (sign, name)


@pytest.mark.parametrize("name", ["hybrid", "vlb"])
def test_a_model_with_learned_variances_is_trained_sampled_scored_and_kept(name):
    """From an objective to bits/dim: what it learns of its variances is better than both ends, and comes back from
    disk."""
    process = DiscreteProcess.linear(20, 0.01, 0.3)
    torch.manual_seed(0)
    denoiser = denoiser_named("eps").build(NETWORK, process)
    objective = objective_named(name, denoiser)
    optimizer, g = torch.optim.Adam(denoiser.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    levels = torch.randint(90, 160, (64, 1, 4, 4), generator=g).to(torch.uint8)
    values = []
    for step in range(150):
        rows = (torch.arange(32) + 32 * step) % 64
        uniforms, eps = torch.rand(32, generator=g, dtype=torch.float64), torch.randn(32, 1, 4, 4, generator=g)
        losses = objective(denoiser, levels[rows] / 127.5 - 1.0, uniforms, eps)
        optimizer.zero_grad()
        losses.rows.mean().backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        if objective.remembers:
            objective.observe(losses.time, losses.values)
        values.append(float(losses.rows.mean().detach()))
    assert sum(values[-30:]) < 0.9 * sum(values[:30])
    files = model_bytes(denoiser.named_weights(), denoiser, {})
    loaded = model_from_bytes(files).denoiser
    assert loaded.learns_variance
    ids, design = torch.arange(64), full_design(20, 64)
    bits = {}
    for sigma2 in ("learned", "beta", "beta_tilde"):
        made = bound_of(loaded, sigma2)
        found = elbo(made.denoiser, levels, ids, design, 0, made.variance, batch_size=320)
        assert bool(found.terms.isfinite().all())
        bits[sigma2] = float(found.parts()[2].mean())
    assert bits["learned"] < min(bits["beta"], bits["beta_tilde"])
    images = sample(loaded, DDPM(Learned(), 10), torch.arange(16), 0)
    assert bool(images.isfinite().all())
    assert not torch.equal(images, sample(loaded, DDPM(steps=10), torch.arange(16), 0))
