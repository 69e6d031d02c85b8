"""Guidance (Ho and Salimans 2021; Kynkaanniemi 2024; Karras 2024) against distributions that are known."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from ddpm_core.config import UNetConfig
from ddpm_core.denoiser import Prediction, check_label
from ddpm_core.errors import ConfigError
from ddpm_core.guidance import Guided, check_weaker, within
from ddpm_core.parameterizations import DENOISERS
from ddpm_core.process.base import Process
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM

NETWORK = UNetConfig(
    image_size=4, in_channels=1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), num_groups=4, dropout=0.0, num_classes=3,
)  # fmt: skip
PROCESSES = {"discrete": DiscreteProcess.cosine(1000), "continuous": ContinuousProcess.linear(-13.3, 8.0)}


@dataclass
class GaussianClasses:
    """x_0 ~ N(mean of its class, variance), N(the last mean, variance) without a label: the exact prediction."""

    process: Process
    means: tuple[float, ...] = (-0.3, 0.2, 0.05)
    variance: float = 0.04
    holds: str = "eps"
    image_shape: tuple[int, int, int] = (1, 2, 2)
    calls: list[int] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.means) - 1

    def __call__(self, z_t: torch.Tensor, time: torch.Tensor, label: torch.Tensor | None = None) -> Prediction:
        self.calls.append(len(z_t))
        now = self.process.at(time)
        of_row = torch.full((len(z_t),), -1) if label is None else label
        mean = torch.tensor(self.means, dtype=torch.float64)[of_row][:, None, None, None]
        total = now.alpha.square() * self.variance + now.sigma.square()
        gap = (z_t.double() - now.alpha * mean) / total
        if self.holds == "eps":
            return Prediction.of_eps(z_t, now, (now.sigma * gap).to(z_t.dtype))
        return Prediction.of_x_0(z_t, now, (mean + now.alpha * self.variance * gap).to(z_t.dtype))


def drawn(denoiser: object, n: int, label: torch.Tensor | None = None, steps: int = 60) -> torch.Tensor:
    return sample(denoiser, DDIM(steps), torch.arange(n), 3, clip=None, label=label)


@pytest.mark.parametrize("holds", ["eps", "x_0"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance_draws_from_the_tilted_gaussian(scale: float, process: Process, holds: str) -> None:
    """Ho and Salimans 2021, eq. 6: p(x)^(1 - w) p(x | c)^w of two Gaussians of one variance is N(m_0 + w (m_c - m_0),
    that variance), and so it is at every noise level."""
    world = GaussianClasses(process, holds=holds)
    label = torch.arange(3000) % 2
    x = drawn(Guided(world, scale), 3000, label, steps=250)
    tilted = tuple(world.means[-1] + scale * (mean - world.means[-1]) for mean in world.means)
    torch.testing.assert_close(
        x, drawn(GaussianClasses(process, tilted, holds=holds), 3000, label, steps=250), rtol=0, atol=2e-4
    )
    for c in (0, 1):
        of_class = x[label == c].double()
        error = (world.variance / of_class.numel()) ** 0.5
        assert float(of_class.mean()) == pytest.approx(tilted[c], abs=4 * error + 1e-3)
        # 250 steps of DDIM lose a few hundredths of the variance.
        assert float(of_class.var()) == pytest.approx(world.variance, rel=0.08)


@pytest.mark.parametrize("sampler", [DDIM(7), DDPM(steps=7)], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("kind", ["eps", "v", "edm"])
def test_the_ends_of_guidance_are_the_plain_sampler_bit_for_bit_in_one_call(kind: str, sampler: object) -> None:
    torch.manual_seed(0)
    denoiser = DENOISERS[kind].build(NETWORK, DiscreteProcess.linear(50)).eval()
    with torch.no_grad():  # what begins at zero lets neither time nor label through
        for parameter in denoiser.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids, label = torch.arange(5), torch.tensor([0, 1, 2, -1, 1])
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    plain = {w: sample(denoiser, sampler, ids, 0, label=given) for w, given in ((1.0, label), (0.0, None))}
    before = len(calls)
    for w, expected in plain.items():
        assert torch.equal(sample(Guided(denoiser, w), sampler, ids, 0, label=label), expected)
    assert len(calls) == 2 * before
    assert not torch.equal(plain[0.0], plain[1.0])
    sample(Guided(denoiser, 1.5), sampler, ids, 0, label=label)
    assert len(calls) == 3 * before
    # A row without a label is not led anywhere.
    assert torch.allclose(
        sample(Guided(denoiser, 3.0), sampler, ids, 0, label=label)[3], plain[0.0][3], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_outside_the_interval_the_conditional_prediction_stands_alone(process: Process) -> None:
    """Kynkaanniemi 2024, eq. 6: w where low < sigma / alpha <= high, 1 elsewhere; there it costs one call."""
    world, interval = GaussianClasses(process), (0.2, 2.0)
    times = DDIM(25).times(process)
    levels = (process.at(times).sigma / process.at(times).alpha).flatten()
    inside = (levels > 0.2) & (levels <= 2.0)
    assert 0 < int(inside.sum()) < 25
    assert torch.equal(within(process.at(times), interval), inside)
    ids, label = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    seen = []
    guided = Guided(world, 3.0, interval)
    sample(guided, DDIM(25), ids, 0, label=label, on_step=lambda k, z, x_0: seen.append((z, x_0)))
    assert len(world.calls) == 25 + int(inside.sum())
    for k, (z, x_0) in enumerate(seen):
        now = times[k].expand(8)
        expected = Guided(world, 3.0)(z, now, label) if inside[k] else world(z, now, label)
        assert torch.equal(x_0, expected.clipped().x_0)
    # Rows at several noise levels, as a likelihood has them: each as if it were alone.
    z = torch.randn(25, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixed = guided(z, times, torch.ones(25, dtype=torch.int64))
    for k in range(25):
        alone = guided(z[k : k + 1], times[k : k + 1], torch.ones(1, dtype=torch.int64))
        torch.testing.assert_close(mixed.held[k : k + 1], alone.held, rtol=0, atol=1e-12)


def test_autoguidance_leads_away_from_the_weaker_model() -> None:
    """Karras 2024, eq. 3: D_0 + w (D_1 - D_0) with both models given the label."""
    process = PROCESSES["continuous"]
    strong, weak = GaussianClasses(process), GaussianClasses(process, means=(0.1, 0.1, 0.1))
    label = torch.arange(2000) % 2
    x = drawn(Guided(strong, 2.0, weaker=weak), 2000, label)
    for c in (0, 1):
        expected = 0.1 + 2.0 * (strong.means[c] - 0.1)
        assert float(x[label == c].mean()) == pytest.approx(expected, abs=0.02)
    assert torch.equal(drawn(Guided(strong, 0.0, weaker=weak), 8, label[:8]), drawn(weak, 8, label[:8]))
    assert torch.equal(drawn(Guided(strong, 1.0, weaker=weak), 8, label[:8]), drawn(strong, 8, label[:8]))


def test_autoguidance_needs_no_labels() -> None:
    bare = replace(NETWORK, num_classes=None)
    process = DiscreteProcess.linear(20)
    strong, weak = (DENOISERS[kind].build(bare, process).eval() for kind in ("eps", "v"))
    x = sample(Guided(strong, 2.0, weaker=weak), DDIM(4), torch.arange(3), 0)
    assert bool(x.isfinite().all())


def test_a_weaker_model_must_be_asked_the_same() -> None:
    own = DENOISERS["eps"].build(NETWORK, DiscreteProcess.linear(50))
    other_classes = replace(NETWORK, num_classes=4)
    other_shape = replace(NETWORK, image_size=8)
    for network, process, words in (
        (other_shape, DiscreteProcess.linear(50), "image shape is (1, 8, 8), not (1, 4, 4)"),
        (other_classes, DiscreteProcess.linear(50), "number of classes is 4, not 3"),
        (NETWORK, DiscreteProcess.linear(51), "another noise schedule"),
        (NETWORK, DiscreteProcess.cosine(50), "another noise schedule"),
        (NETWORK, ContinuousProcess.linear(), "another noise schedule"),
    ):
        with pytest.raises(ConfigError) as refused:
            Guided(own, 2.0, weaker=DENOISERS["eps"].build(network, process))
        assert words in str(refused.value)
    learned = [DENOISERS["eps"].build(NETWORK, ContinuousProcess.learned(-13.3, 5.0, True)) for _ in range(2)]
    with torch.no_grad():
        for parameter in learned[1].process.parameters():
            parameter.add_(0.1)
    check_weaker(*learned)
    with pytest.raises(ConfigError):
        check_weaker(learned[0], DENOISERS["eps"].build(NETWORK, ContinuousProcess.edm()))


def test_what_guidance_refuses() -> None:
    world = GaussianClasses(PROCESSES["discrete"])
    for scale, interval in ((float("nan"), None), (float("inf"), None), (2.0, (2.0, 0.5)), (2.0, (-1.0, 0.5))):
        with pytest.raises(ConfigError):
            Guided(world, scale, interval)
    bare = replace(NETWORK, num_classes=None)
    unconditional = DENOISERS["eps"].build(bare, DiscreteProcess.linear(50))
    with pytest.raises(ConfigError, match="trained with labels"):
        Guided(unconditional, 2.0)
    for denoiser, wrong in ((unconditional, 0), (world, 2), (world, -2)):
        with pytest.raises(ConfigError, match=str(wrong)):
            check_label(denoiser, torch.tensor([0, wrong]) if wrong else torch.tensor([0]))
    check_label(world, torch.tensor([0, 1, -1]))
    check_label(unconditional, torch.tensor([-1]))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("interval", [None, (0.3, 3.0), (1e9, 1e10)])
def test_the_calls_of_a_sampler_are_foretold(
    process: Process, scale: float, interval: tuple[float, float] | None
) -> None:
    told, weaker = GaussianClasses(process), GaussianClasses(process)
    guided = Guided(told, scale, interval, weaker)
    sample(guided, DDIM(20), torch.arange(2), 3, label=torch.tensor([0, 1]))
    assert guided.calls(DDIM(20).times(process)) == (len(told.calls), len(weaker.calls))
