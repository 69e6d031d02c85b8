"""Sampling in continuous time and on sub-sequences: Kingma 2021 (VDM), app. A.4; Nichol and Dhariwal 2021, sec. 4; Lin
2024 (from SNR 0); worlds where the best denoiser is known."""

from dataclasses import dataclass, replace

import pytest
import torch
from support.denoisers import FOUR_PIXELS, GaussianWorld, GreyWorld, toy
from support.processes import PROCESSES

from ddpm_core import counter_random
from ddpm_core.denoiser import Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.images import to_levels
from ddpm_core.likelihood.bounds import Respaced
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import Beta, BetaTilde, Learned
from ddpm_core.samplers.base import STATIC_CLIP, sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM

WORLD = GreyWorld((0, 60, 128, 255), (0.4, 0.1, 0.2, 0.3))
torch.manual_seed(0)
CONTINUOUS = {
    "linear": ContinuousProcess.linear(),
    "learned": ContinuousProcess.learned(-13.3, 6.0),
    "edm": ContinuousProcess.edm(0.002, 40.0),
}
ZERO_TERMINAL = DiscreteProcess.cosine(60).rescaled_to_zero_terminal_snr()


def check_levels(levels, off=0):
    """Every pixel is within `off` of a level of the world, and each level is as frequent as its probability, within 4
    standard errors and what finite steps leave."""
    distance, nearest = (levels.flatten().long()[:, None] - WORLD.levels).abs().min(1)
    assert int(distance.max()) <= off
    found = nearest.bincount(minlength=len(WORLD.levels)) / levels.numel()
    error = (WORLD.probabilities * (1 - WORLD.probabilities) / levels.numel()).sqrt()
    assert bool(((found - WORLD.probabilities).abs() < 4 * error + 0.01).all()), found


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("sampler", [DDPM(BetaTilde(), 200), DDIM(100), DDIM(100, 1.0)], ids=["ddpm", "ddim", "eta-1"])
def test_the_world_is_sampled_as_it_is(name, sampler):
    """The nearest level of z_0 / alpha_0 is the decoder's most probable one (Kingma 2021, eq. 8). z_0 still has noise:
    a sixth of a level's distance at gamma = -13.3 and a quarter at sigma = 0.002."""
    x = sample(WORLD.denoiser(CONTINUOUS[name]), sampler, torch.arange(1000), 0)
    levels = to_levels(x)
    check_levels(levels, off=1)
    assert float(torch.isin(levels, WORLD.levels.to(torch.uint8)).double().mean()) > 0.93


@pytest.mark.parametrize(
    ("sampler", "off"),
    [(DDPM(BetaTilde()), 0), (DDPM(Beta(), 30), 30), (DDIM(30), 30)],
    ids=["all", "beta-30", "ddim-30"],
)
def test_from_snr_0_the_world_is_sampled_as_it_is(sampler, off):
    """Lin 2024: with a denoiser that holds x_0, the first step from pure noise is finite and exact. Of half the steps,
    some pixels end between two levels."""
    shown = []
    x = sample(
        WORLD.denoiser(ZERO_TERMINAL), sampler, torch.arange(1000), 0, on_step=lambda k, z, x_0: shown.append(x_0)
    )
    mean = float((WORLD.values * WORLD.probabilities).sum())
    torch.testing.assert_close(shown[0], torch.full_like(x, mean))
    check_levels(to_levels(x), off)


@dataclass(frozen=True)
class WithFraction:
    """A denoiser that predicts one variance fraction besides."""

    denoiser: object
    fraction: float

    @property
    def process(self):
        return self.denoiser.process

    @property
    def image_shape(self):
        return self.denoiser.image_shape

    @property
    def num_classes(self):
        return None

    def __call__(self, z_t, time, label=None):
        return replace(self.denoiser(z_t, time), variance_fraction=torch.full_like(z_t, self.fraction))


def chain(alpha, sigma, m, v, noise_of):
    """Mean and variance after each step's affine map, for data N(m, v): from the noisiest time to the last."""
    mean, spread = 0.0, alpha[0] ** 2 + sigma[0] ** 2
    for k in range(len(alpha) - 1):
        a_t, s_t, a_s, s_s = alpha[k], sigma[k], alpha[k + 1], sigma[k + 1]
        total_t, total_s = a_t**2 * v + s_t**2, a_s**2 * v + s_s**2
        slope = a_t / a_s * total_s / total_t
        added = s_t**2 - (a_t / a_s * s_s) ** 2
        noise = noise_of(added, a_t, s_t, a_s, s_s) if s_s else 0.0
        mean, spread = a_s * m + slope * (mean - a_t * m), slope**2 * spread + noise
    return mean, spread


def beta(added, a_t, s_t, a_s, s_s):
    return added * (a_s**2 + s_s**2) / (a_t**2 + s_t**2)


def beta_tilde(added, a_t, s_t, a_s, s_s):
    return added * s_s**2 / s_t**2


def between(added, a_t, s_t, a_s, s_s):
    """Learned, at f = 0.3."""
    return beta(added, a_t, s_t, a_s, s_s) ** 0.3 * beta_tilde(added, a_t, s_t, a_s, s_s) ** 0.7


KINDS = {"beta": (Beta(), beta), "beta_tilde": (BetaTilde(), beta_tilde), "learned": (Learned(), between)}


def check_moments(x, mean, spread):
    size = x.numel()
    assert float(x.mean()) == pytest.approx(mean, abs=4 * (spread / size) ** 0.5)
    assert float(x.double().var()) == pytest.approx(spread, abs=4 * spread * (2 / size) ** 0.5)


@pytest.mark.parametrize("sigma2", KINDS)
@pytest.mark.parametrize("name", [*PROCESSES, "zero-terminal"])
def test_a_sub_sequence_has_its_own_variances(name, sigma2):
    """Data N(m, v I): every step is affine, so the samples' moments follow from the variances of the very steps (Nichol
    and Dhariwal 2021, sec. 4), learned ones included."""
    process = ZERO_TERMINAL if name == "zero-terminal" else PROCESSES[name]
    m, v, (variance, formula) = 0.3, 0.25, KINDS[sigma2]
    denoiser = WithFraction(BestX0(process, m, v), 0.3)
    sampler = DDPM(variance, 7)
    times = sampler.times(process)
    assert len(times) == 7
    alpha, sigma = [*process.alpha[times].tolist(), 1.0], [*process.sigma[times].tolist(), 0.0]
    if name == "zero-terminal":
        alpha[0] = 1e-30  # its square is 0 in the formulas above, whose ratio is not
    x = sample(denoiser, sampler, torch.arange(3000), 1, clip=None)
    check_moments(x, *chain(alpha, sigma, m, v, formula))


@dataclass(frozen=True)
class BestX0:
    """The best x_0 of data N(m, v I), held as x_0: also at SNR 0."""

    process: object
    m: float
    v: float
    image_shape: tuple[int, int, int] = (1, 2, 2)
    num_classes: int | None = None

    def __call__(self, z_t, time, label=None):
        now = self.process.at(time)
        gain = now.alpha * self.v / (now.alpha**2 * self.v + now.sigma**2)
        return Prediction.of_x_0(z_t, now, (self.m + gain * (z_t.double() - now.alpha * self.m)).to(z_t.dtype))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_ancestral_samples_of_continuous_time_have_the_moments_of_their_chain(name):
    """Kingma 2021, app. A.4, down to z_0, which still has its noise, divided by alpha_0."""
    process, m, v = CONTINUOUS[name], 0.3, 0.25
    world = GaussianWorld(torch.full((4,), m), v * torch.eye(4), (1, 2, 2))
    for steps in (1, 9):
        times = process.grid(steps).detach()
        whole = process.at(torch.cat([times, process.after(times).detach()[-1:]]))
        alpha, sigma = whole.alpha.flatten().tolist(), whole.sigma.flatten().tolist()
        mean, spread = chain(alpha, sigma, m, v, beta_tilde)
        x = sample(world.denoiser(process), DDPM(steps=steps), torch.arange(3000), 1, clip=None)
        check_moments(x, mean / alpha[-1], spread / alpha[-1] ** 2)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_many_steps_sample_the_gaussian_it_was_given(name):
    x = sample(FOUR_PIXELS.denoiser(CONTINUOUS[name]), DDPM(steps=400), torch.arange(4000), 1, clip=None)
    FOUR_PIXELS.check_moments(x, bias=0.01)


@pytest.mark.parametrize("clip", [None, STATIC_CLIP])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_ancestral_sampling_is_ddpm_on_the_table_of_its_times(name, clip, monkeypatch):
    """Noise for noise, where the keys are made alike: z_0 is what DDPM with beta_tilde has at index 0."""
    process, ids, steps = CONTINUOUS[name], torch.arange(20), 12
    denoiser, found = FOUR_PIXELS.denoiser(process), []
    ours = sample(denoiser, DDPM(steps=steps), ids, 5, clip)
    original = counter_random.normal
    # A table counts down from T to t = 1, a continuous process up from 0.
    monkeypatch.setattr(
        counter_random, "normal", lambda seed, stream, ids, t, *more: original(seed, stream, ids, steps + 1 - t, *more)
    )
    respaced = Respaced.of(denoiser, steps)
    assert respaced.process.num_timesteps == steps + 1
    sample(respaced, DDPM(), ids, 5, clip, on_step=lambda k, z, x_0: found.append(z))
    alpha_0 = float(process.at(process.grid(1)[:1] * 0 + process.ends[0]).alpha)
    torch.testing.assert_close(ours, found[-1] / alpha_0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_ddim_at_eta_1_is_ancestral_sampling_noise_for_noise(name):
    """Song 2021, DDIM, eq. 16, on any process."""
    denoiser, ids = FOUR_PIXELS.denoiser(CONTINUOUS[name]), torch.arange(50)
    one, two = (sample(denoiser, s, ids, 3, clip=None) for s in (DDPM(steps=15), DDIM(15, 1.0)))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert not torch.equal(sample(denoiser, DDIM(15), ids, 3, clip=None), two)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_ddim_follows_the_flow_with_first_order(name):
    """Song 2021, DDIM, eq. 13: twice the steps, half the distance to where the flow of a Gaussian leads."""
    process, ids = CONTINUOUS[name], torch.arange(40)
    start = counter_random.normal(0, "sample", ids, 0, (1, 2, 2)).double() * process.prior_variance**0.5
    low, high = (process.at(torch.tensor([end], dtype=torch.float64)) for end in process.ends)
    exact = FOUR_PIXELS.flow(start, high, low) / low.alpha
    errors = [
        float((sample(FOUR_PIXELS.denoiser(process), DDIM(k), ids, 0, clip=None).double() - exact).abs().max())
        for k in (200, 400)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.25)


@pytest.mark.parametrize("name", PROCESSES)
def test_all_steps_are_the_same_bits_however_they_are_asked_for(name):
    denoiser, ids = FOUR_PIXELS.denoiser(PROCESSES[name]), torch.arange(5)
    for variance in (Beta(), BetaTilde()):
        assert torch.equal(sample(denoiser, DDPM(variance), ids, 0), sample(denoiser, DDPM(variance, 60), ids, 0))


def test_a_samples_bits_do_not_depend_on_the_others():
    denoiser = WORLD.denoiser(CONTINUOUS["linear"])
    full = sample(denoiser, DDPM(steps=20), torch.arange(6), 0)
    assert torch.equal(sample(denoiser, DDPM(steps=20), torch.tensor([4, 2]), 0), full[[4, 2]])
    assert not torch.equal(sample(denoiser, DDPM(steps=20), torch.arange(6), 1), full)


@pytest.mark.parametrize(
    ("process", "sampler", "match"),
    [
        (CONTINUOUS["linear"], DDPM(), r"^steps: None says nothing in continuous time"),
        (CONTINUOUS["linear"], DDPM(steps=0), r"0 is not >= 1"),
        (CONTINUOUS["edm"], DDIM(0), r"0 is not >= 1"),
        (CONTINUOUS["linear"], DDPM(Beta(), 10), r"^sigma2: 'beta' is no variance of a continuous process"),
        (CONTINUOUS["linear"], DDPM(Learned(), 10), r"^sigma2: 'learned' is no variance of a continuous process"),
        (PROCESSES["straight"], DDPM(steps=61), r"61 is not in 1\.\.60"),
        (PROCESSES["straight"], DDPM(steps=0), r"0 is not in 1\.\.60"),
        (PROCESSES["straight"], DDPM(Learned()), r"^sigma2: 'learned' needs a model that predicts its variances"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(process, sampler, match):
    with pytest.raises(ConfigError, match=match):
        sample(toy(process, (1, 2, 2)), sampler, torch.arange(2), 0)
