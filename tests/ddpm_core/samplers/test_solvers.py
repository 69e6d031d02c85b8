"""Certificates of the solvers: their order, the moments of their samples, their reference values, their ends."""

import math
from dataclasses import dataclass, field
from typing import get_args

import pytest
import torch
from support.denoisers import FOUR_PIXELS, FunctionDenoiser
from support.solvers import CONTINUOUS, DETERMINISTIC, EVERY, PROCESSES, STOCHASTIC

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.process.base import Images, Process, Spacing, Time
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import Clip, Predictor, sample, steps_between
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from ddpm_core.samplers.dpm_solver import DPMSolver
from ddpm_core.samplers.encode import encode
from ddpm_core.samplers.heun import Heun

ORDERS = {"ddim": 1, "2m": 2, "heun": 2, "3m": 3}


def start_of(process: Process, n: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 1, 2, 2, dtype=torch.float64, generator=generator)
    return noise * math.sqrt(process.prior_variance)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("solver", ORDERS)
def test_the_error_falls_with_the_order_of_the_solver(solver, name):
    """Data N(m, S) in float64, whose flow is known: Song 2021, DDIM, eq. 13; Lu 2022, DPM-Solver++, algs. 2 and its
    third order; Karras 2022, alg. 1. On the grid of rho = 7: on even steps of log-SNR the third order's first error
    term nearly vanishes for a Gaussian, which would look like order 4."""
    process = CONTINUOUS[name]
    z = start_of(process)

    def error(steps: int) -> float:
        sampler = DETERMINISTIC[solver](steps, "edm")
        x = sample(FOUR_PIXELS.denoiser(process), sampler, torch.arange(len(z)), 0, None, start=z)
        times = sampler.times(process)
        end = steps_between(process, times).then[-1:]
        return float((x - FOUR_PIXELS.flow(z, process.at(times[:1]), end) / end.alpha).abs().max())

    coarse, fine = error(60), error(120)
    assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("solver", ORDERS)
def test_encoding_has_the_order_of_the_solver_and_leads_back(solver):
    """The flow backwards (Song 2021, DDIM, sec. 5.4)."""
    process = CONTINUOUS["vdm"]
    denoiser, x_0 = FOUR_PIXELS.denoiser(process), start_of(process)

    def errors(steps: int) -> tuple[float, float]:
        sampler = DETERMINISTIC[solver](steps, "edm")
        z = encode(denoiser, sampler, x_0, None)
        low, high = (process.at(torch.tensor([gamma], dtype=torch.float64)) for gamma in process.ends)
        exact = FOUR_PIXELS.flow(low.alpha * x_0, low, high)
        back = sample(denoiser, sampler, torch.arange(len(z)), 0, None, start=z)
        return float((z - exact).abs().max()), float((back - x_0).abs().max())

    coarse, fine = errors(60), errors(120)
    assert math.log2(coarse[0] / fine[0]) == pytest.approx(ORDERS[solver], abs=0.25)
    assert fine[1] < coarse[1] < 0.2


@pytest.mark.parametrize("name", ["linear", "cosine", "exploding"])
@pytest.mark.parametrize("solver", ORDERS)
def test_a_table_is_solved_at_its_own_times_with_the_same_order(solver, name):
    """No time between those of the table is ever asked for: the grid's irregular steps are taken as they are."""
    process = {
        "linear": DiscreteProcess.linear(4000, 2.5e-5, 0.005),
        "cosine": DiscreteProcess.cosine(4000),
        "exploding": DiscreteProcess.from_alpha_sigma([1.0] * 4000, torch.logspace(-2, 1, 4000, dtype=torch.float64)),
    }[name]
    inner = process.timesteps[(process.log_snr < 6.0) & (process.log_snr > -5.0)]
    z, denoise = start_of(process), Predictor(FOUR_PIXELS.denoiser(process), None, None)

    def error(count: int) -> float:
        times = inner[torch.linspace(len(inner) - 1, 0, count + 1).round().long()]
        steps, memory, x = process.step(times[:-1], times[1:]), None, z
        for k in range(count):
            x, memory = DETERMINISTIC[solver](1, "time").step(steps[k : k + 1], x, denoise, lambda: z, memory)
        return float((x - FOUR_PIXELS.flow(z, steps.now[:1], steps.then[-1:])).abs().max())

    assert math.log2(error(80) / error(160)) > ORDERS[solver] - 0.25


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_samplers_with_noise_have_the_moments_of_the_data(solver, name):
    """Mean and covariance within four standard errors (Lu 2022, eq. 18; Karras 2022, alg. 2; Ho 2020, alg. 2). The bias
    is what the flow's end leaves of noise, and what 100 steps are off."""
    process = CONTINUOUS[name]
    x = sample(FOUR_PIXELS.denoiser(process), STOCHASTIC[solver](100, "edm"), torch.arange(6000), 1, None)
    first_order = solver in ("ddpm", "ddim, eta 0.5")
    FOUR_PIXELS.check_moments(x, bias=0.02 if first_order else 0.003)


@dataclass
class Point:
    """Data that are one image, c: the best x_0 is c wherever z is; a `Denoiser`."""

    process: Process
    image_shape: tuple[int, int, int] = (1, 2, 2)
    num_classes: int | None = None
    value: float = 0.3
    called: list[Time] = field(default_factory=list)

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        assert bool(z_t.isfinite().all())
        self.called.append(time[:1])
        return Prediction.of_x_0(z_t, self.process.at(time), torch.full_like(z_t, self.value))


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("solver", EVERY)
def test_every_solver_on_every_grid_ends_at_the_image(solver, name, spacing):
    """Few steps: finite, no residual noise but that of z_0 of continuous time, no call wasted on clean data."""
    process = PROCESSES[name]
    for steps in range(1, 7):
        sampler, denoiser = EVERY[solver](steps, spacing), Point(process)
        if name == "zero terminal" and spacing in ("log_snr", "edm"):
            with pytest.raises(ConfigError, match=r"spacing: .* needs a process that ends above SNR 0"):
                sampler.times(process)
            continue
        x = sample(denoiser, sampler, torch.arange(5), 2)
        left = float(steps_between(process, sampler.times(process)).then.sigma[-1])
        assert float((x - denoiser.value).abs().max()) <= 5.0 * left + 1e-5
        assert torch.equal(torch.cat(denoiser.called), sampler.calls(process))


def test_the_calls_of_heun_and_of_the_third_order():
    """2 K - 1 where the last step leads to the image (Karras 2022, alg. 1), 2 K where to z_0; K + 1 with the start."""
    table, continuous = PROCESSES["linear"], CONTINUOUS["vdm"]
    assert [len(Heun(10).calls(process)) for process in (table, continuous)] == [19, 20]
    assert [len(DPMSolver(10, 3).calls(process)) for process in (table, continuous)] == [11, 11]
    assert [len(DPMSolver(10, 3, 1).calls(process)) for process in (table, continuous)] == [10, 10]
    assert [len(s.calls(table)) for s in (DDIM(10), DDPM(), DPMSolver(10))] == [10, 100, 10]
    assert DPMSolver(4, 3).calls(table).tolist()[:3] == [*DPMSolver(4).times(table)[:2], DPMSolver(4).times(table)[1]]


@pytest.mark.parametrize("solver", EVERY)
def test_a_sample_of_any_solver_does_not_depend_on_its_batch(solver):
    denoiser, sampler = FOUR_PIXELS.denoiser(PROCESSES["cosine"]), EVERY[solver](5, "time")
    together = sample(denoiser, sampler, torch.arange(10, 15), 3)
    alone = sample(denoiser, sampler, torch.tensor([13]), 3)
    torch.testing.assert_close(alone[0], together[3], rtol=0.0, atol=1e-6)
    assert torch.equal(sample(denoiser, sampler, torch.arange(10, 15), 3), together)
    assert not torch.equal(sample(denoiser, sampler, torch.arange(10, 15), 4), together)


def test_first_order_with_noise_is_ancestral_sampling():
    """Lu 2022, eq. 18 at its first order: the first step of the SDE variant is DDPM's with beta_tilde, noise for noise;
    with K = 2 on a table so is the last, to the image."""
    denoiser, ids = FOUR_PIXELS.denoiser(PROCESSES["linear"]), torch.arange(50)
    for order in (2, 3):
        ours = sample(denoiser, DPMSolver(2, order, 1, "time"), ids, 3, None)
        torch.testing.assert_close(ours, sample(denoiser, DDIM(2, 1.0), ids, 3, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vdm", "linear"])
def test_churn_adds_the_noise_between_two_times_of_the_process(name):
    """Karras 2022, alg. 2: sbar grows by min(S_churn / K, sqrt(2) - 1) within [S_min, S_max] only; on a table to the
    last time that is not beyond it."""
    process = PROCESSES[name]
    sbar = lambda time: float((process.at(time).sigma / process.at(time).alpha).max())  # noqa: E731
    plain, churned = (
        Heun(10, "edm").calls(process),
        Heun(10, "edm", churn=3.0, churn_interval=(0.1, 2.0)).calls(process),
    )
    raised = 0
    for before, after in zip(plain[::2], churned[::2], strict=True):
        before, after = before[None], after[None]
        if 0.1 <= sbar(before) <= 2.0 and before != plain[-1]:
            assert sbar(before) <= sbar(after) <= 1.3 * sbar(before) * (1.0 + 1e-12)
            raised += int(after > before)
            if name == "linear":
                assert int(after) == 99 or sbar(after + 1) > 1.3 * sbar(before)
            else:
                assert sbar(after) == pytest.approx(1.3 * sbar(before))
        else:
            assert torch.equal(before, after)
    assert raised >= 3
    assert float(process.noisier(plain[1:2], 1.0 + 1e9)) == pytest.approx(float(plain[0]))
    for wrong in ({"churn": -1.0}, {"churn": math.nan}, {"churn_interval": (2.0, 1.0)}, {"churn_noise": 0.0}):
        with pytest.raises(ConfigError, match="do not satisfy 0 <= churn"):
            Heun(10, **wrong).times(process)


def test_dynamic_thresholding_divides_by_a_percentile_of_each_image():
    """Saharia 2022, Imagen, sec. 2.3, whichever solver asks."""
    process = PROCESSES["linear"]
    now = process.at(torch.tensor([50, 50]))
    x_0 = torch.tensor([[0.5, -0.9, 0.2, 0.1], [0.5, -3.0, 2.0, 0.1]]).reshape(2, 1, 2, 2)
    z = torch.randn(2, 1, 2, 2)
    clipped = Clip(75.0)(Prediction.of_x_0(z, now, x_0))
    assert torch.equal(clipped.x_0[0], x_0[0])
    torch.testing.assert_close(clipped.x_0[1].flatten(), torch.tensor([0.25, -1.0, 1.0, 0.05]))
    torch.testing.assert_close((now.alpha * clipped.x_0 + now.sigma * clipped.eps).float(), z)
    for percentile in (0.0, 100.1, math.nan):
        with pytest.raises(ConfigError, match=r"percentile: .* is not in"):
            Clip(percentile)
    denoiser = FunctionDenoiser(lambda z_t, t: 3.0 * z_t, process, (1, 2, 2))
    for solver in EVERY:
        static, dynamic = (
            sample(denoiser, EVERY[solver](4, "time"), torch.arange(3), 0, c) for c in (Clip(), Clip(90.0))
        )
        assert float(dynamic.abs().max()) <= 1.0 + 1e-6
        assert not torch.equal(static, dynamic)


def test_what_cannot_be_encoded_is_refused():
    denoiser, x = FOUR_PIXELS.denoiser(PROCESSES["linear"]), torch.zeros(1, 1, 2, 2)
    for sampler, rule in ((DDPM(), "draws noise"), (DDIM(4, 0.1), "draws noise"), (Heun(4, churn=1.0), "draws noise"),
                          (DDIM(1), "steps: 1")):  # fmt: skip
        with pytest.raises(ConfigError, match=rule):
            encode(denoiser, sampler, x)
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        encode(Point(PROCESSES["zero terminal"]), DDIM(4), x)


class PublishedThirdOrder(DPMSolver):
    """3M as two public implementations have it: half of the second difference, after a start of first order."""

    @property
    def _starts_twice(self) -> bool:
        return False

    @staticmethod
    def weights(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, second, third = DPMSolver.weights(h)
        return first, second, third / 2.0


SOLVERS = {"ddim": DDIM(), "dpmpp_2m": DPMSolver(), "dpmpp_3m": PublishedThirdOrder(order=3), "heun": Heun()}


@pytest.mark.parametrize("name", SOLVERS)
def test_reference_values(name, modern_reference):
    """An implementation of its own, in float64."""
    reference = modern_reference["solvers"]
    lam, x = reference["lam"], torch.tensor(reference["x"], dtype=torch.float64)[:, None, None]
    process = ContinuousProcess.linear(-10.0, 10.0)

    def eps(z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return 0.8 * z * gamma[:, None, None, None].sigmoid().sqrt() + 0.1 * (3.0 * z).tanh()

    times = -2.0 * torch.tensor(lam, dtype=torch.float64)
    steps, memory, z = process.step(times[:-1], times[1:]), None, x
    denoise = Predictor(FunctionDenoiser(eps, process, tuple(x.shape[1:])), None, None)
    for k in range(len(lam) - 1):
        z, memory = SOLVERS[name].step(steps[k : k + 1], z, denoise, lambda: x, memory)
    expected = torch.tensor(reference["result"][name], dtype=torch.float64)
    torch.testing.assert_close(z[:, 0, 0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("starts_twice", [False, True])
def test_with_half_the_second_difference_the_third_order_is_a_second(starts_twice, monkeypatch):
    """Whichever way it starts; and with the whole one after a start of first order it is one of second order, too."""
    process = ContinuousProcess.linear(-8.0, 1.0)
    z, denoiser = start_of(process), FOUR_PIXELS.denoiser(process)
    low, high = (process.at(torch.tensor([gamma], dtype=torch.float64)) for gamma in process.ends)
    exact = FOUR_PIXELS.flow(z, high, low) / low.alpha

    def order(sampler: type[DPMSolver]) -> float:
        def error(steps: int) -> float:
            x = sample(denoiser, sampler(steps, 3, spacing="edm"), torch.arange(len(z)), 0, None, start=z)
            return float((x - exact).abs().max())

        return math.log2(error(100) / error(200))

    monkeypatch.setattr(PublishedThirdOrder, "_starts_twice", property(lambda self: starts_twice))
    assert order(PublishedThirdOrder) == pytest.approx(2.0, abs=0.15)
    assert order(DPMSolver) == pytest.approx(3.0, abs=0.15)
    if not starts_twice:
        monkeypatch.setattr(DPMSolver, "_starts_twice", property(lambda self: False))
        assert order(DPMSolver) == pytest.approx(2.0, abs=0.15)
