"""Denoisers that tests know everything of."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ddpm_core.denoiser import Labels, Prediction
from ddpm_core.likelihood.terms import term_bpd, x_0_of
from ddpm_core.process.base import Images, Marginal, Process, Time, q_sample
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.process.variances import ReverseVariance


@dataclass
class FunctionDenoiser:
    """Predicts eps by a function of (z_t, t), such as the exact one of a distribution; a `Denoiser`."""

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    process: Process
    image_shape: tuple[int, int, int] = (1, 8, 8)
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable
    num_classes: int | None = None

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        return Prediction.of_eps(z_t, self.process.at(time), self.function(z_t, time).to(z_t.dtype))

    def in_precision(self, precision: str) -> "FunctionDenoiser":
        return self


def abar(process: DiscreteProcess, t: torch.Tensor) -> torch.Tensor:
    """alpha_t^2 of each row, float64 [B, 1, 1, 1]: a variance-preserving process's share of the image."""
    return process.alpha2[t][:, None, None, None]


def toy_eps(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network of the reference values."""
    return 0.9 * z_t + 0.1 * torch.sin(t.double())[:, None, None, None].to(z_t.dtype)


def toy(process: Process, image_shape: tuple[int, int, int] = (2, 3, 3)) -> FunctionDenoiser:
    """A denoiser that is good at nothing and depends on everything."""
    return FunctionDenoiser(toy_eps, process, image_shape)


def terms_of(
    process: Process,
    levels: torch.Tensor,
    t: torch.Tensor,
    eps: torch.Tensor,
    eps_pred: torch.Tensor,
    variance: ReverseVariance,
    clip: bool = False,
) -> torch.Tensor:
    """The ELBO's term of each row at its own t, given the noise and its prediction."""
    z_t = q_sample(process.at(t), x_0_of(levels), eps)
    prediction = Prediction.of_eps(z_t, process.at(t), eps_pred)
    step = process.step(t, t - 1)
    return term_bpd(step, levels, eps, prediction.clipped() if clip else prediction, variance)


class GaussianWorld:
    """Flattened images x_0 ~ N(mean, covariance), of which everything is known under any (alpha, sigma)."""

    def __init__(self, mean: torch.Tensor, covariance: torch.Tensor, image_shape: tuple[int, int, int]) -> None:
        self.mean, self.covariance, self.image_shape = mean.double(), covariance.double(), image_shape
        self.variances, self.axes = torch.linalg.eigh(self.covariance)

    def spread(self, marginal: Marginal) -> torch.Tensor:
        """Variances of z_t along the axes, [B, D]."""
        return marginal.alpha.flatten(1).square() * self.variances + marginal.sigma.flatten(1).square()

    def denoiser(self, process: Process) -> FunctionDenoiser:
        """The best eps: sigma (alpha^2 S + sigma^2 I)^-1 (z_t - alpha m)."""

        def eps(z_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            now = process.at(time)
            along = (z_t.double().flatten(1) - now.alpha.flatten(1) * self.mean) @ self.axes
            return (along * now.sigma.flatten(1) / self.spread(now) @ self.axes.T).reshape(z_t.shape)

        return FunctionDenoiser(eps, process, self.image_shape)

    def flow(self, z: torch.Tensor, start: Marginal, end: Marginal) -> torch.Tensor:
        """Where the probability-flow ODE takes z: along each axis by the ratio of the standard deviations."""
        along = (z.flatten(1) - start.alpha.flatten(1) * self.mean) @ self.axes
        along = along * (self.spread(end) / self.spread(start)).sqrt()
        return (end.alpha.flatten(1) * self.mean + along @ self.axes.T).reshape(z.shape)

    def check_moments(self, x: torch.Tensor, bias: float, covariance: torch.Tensor | None = None) -> None:
        """Mean and covariance of samples within 4 standard errors, plus what the discretisation can add."""
        covariance = self.covariance if covariance is None else covariance.double()
        x = x.flatten(1).double()
        n, centred = len(x), x - x.mean(0)
        mean_error = (x.mean(0) - self.mean).abs()
        assert bool((mean_error < 4 * (covariance.diagonal() / n).sqrt() + bias).all())
        products = centred[:, :, None] * centred[:, None, :]
        error = (products.mean(0) - covariance).abs()
        assert bool((error < 4 * products.std(0) / n**0.5 + bias).all())


class GreyWorld:
    """Pixels iid over a few grey levels, of which everything is known under any (alpha, sigma).

    The best x_0 is the mean of the posterior over the levels, the best eps what z_t then contains besides.
    """

    def __init__(
        self, levels: Sequence[int], probabilities: Sequence[float], image_shape: tuple[int, int, int] = (1, 2, 2)
    ) -> None:
        self.levels = torch.tensor(levels)
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64)
        self.values = self.levels.double() / 127.5 - 1.0
        self.image_shape = image_shape

    @property
    def entropy(self) -> float:
        """Bits per pixel."""
        return -float((self.probabilities * self.probabilities.log2()).sum())

    def images(self, n: int, seed: int = 0) -> torch.Tensor:
        """uint8 [n, C, H, W]."""
        g = torch.Generator().manual_seed(seed)
        index = torch.multinomial(self.probabilities, n * math.prod(self.image_shape), replacement=True, generator=g)
        return self.levels[index].to(torch.uint8).reshape(n, *self.image_shape)

    def surprise(self, images: torch.Tensor) -> torch.Tensor:
        """-log2 of each image's probability per pixel, [n]: what no code can beat on average."""
        of_level = torch.full((256,), math.inf, dtype=torch.float64)
        of_level[self.levels] = -self.probabilities.log2()
        return of_level[images.long()].flatten(1).mean(1)

    def best_x_0(self, z_t: torch.Tensor, marginal: Marginal) -> torch.Tensor:
        """E[x_0 | z_t] by Bayes over the levels, float64."""
        alpha, sigma = marginal.alpha[..., None], marginal.sigma[..., None]
        distance = (z_t.double()[..., None] - alpha * self.values) / sigma
        return torch.softmax(self.probabilities.log() - 0.5 * distance.square(), -1) @ self.values

    def denoiser(self, process: Process) -> "BestDenoiser":
        """The best one; a `Denoiser` with any process."""
        return BestDenoiser(self, process)


@dataclass
class BestDenoiser:
    """The posterior's mean of x_0 in a `GreyWorld`; a `Denoiser`."""

    world: GreyWorld
    process: Process
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable
    num_classes: int | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.world.image_shape

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        marginal = self.process.at(time)
        return Prediction.of_x_0(z_t, marginal, self.world.best_x_0(z_t, marginal).to(z_t.dtype))

    def in_precision(self, precision: str) -> "BestDenoiser":
        return self


_FACTOR = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [0.0, 0.2, 0.3, 0.0], [0.1, 0.0, 0.2, 0.6]])
FOUR_PIXELS = GaussianWorld(torch.tensor([0.3, -0.2, 0.1, 0.0]), _FACTOR @ _FACTOR.T, (1, 2, 2))


@dataclass
class ClassWorld:
    """Images of classes, each class's pixels iid over a few grey levels; a `Denoiser` that knows everything of them."""

    process: Process
    classes: Sequence[GreyWorld]
    prior: Sequence[float]
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.classes[0].image_shape

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def in_precision(self, precision: str) -> "ClassWorld":
        return self

    def images(self, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n, C, H, W] and their classes [n]."""
        g = torch.Generator().manual_seed(seed)
        label = torch.multinomial(torch.tensor(self.prior), n, replacement=True, generator=g)
        of_class = torch.stack([world.images(n, seed * 100 + 1 + c) for c, world in enumerate(self.classes)])
        return of_class[label, torch.arange(n)], label

    def posterior(self, levels: torch.Tensor) -> torch.Tensor:
        """p(c | x) by Bayes, float64 [n, K]."""
        bits = torch.stack([world.surprise(levels) for world in self.classes], 1) * math.prod(self.image_shape)
        return torch.softmax(torch.tensor(self.prior, dtype=torch.float64).log() - bits * math.log(2.0), 1)

    def __call__(self, z_t: Images, time: Time, label: Labels | None = None) -> Prediction:
        marginal = self.process.at(time)
        alpha, sigma = marginal.alpha[..., None], marginal.sigma[..., None]
        log_weights, means = [], []
        for world, share in zip(self.classes, self.prior, strict=True):
            distance = (z_t.double()[..., None] - alpha * world.values) / sigma
            of_level = world.probabilities.log() - 0.5 * distance.square()
            log_weights.append(of_level.logsumexp(-1).flatten(1).sum(1) + math.log(share))
            means.append(torch.softmax(of_level, -1) @ world.values)
        weights, stacked = torch.softmax(torch.stack(log_weights, 1), 1), torch.stack(means, 1)
        if label is not None:
            known = torch.nn.functional.one_hot(label.clamp(min=0), len(self.classes)).double()
            weights = torch.where((label >= 0)[:, None], known, weights)
        x_0 = (weights[:, :, None, None, None] * stacked).sum(1)
        return Prediction.of_x_0(z_t, marginal, x_0.to(z_t.dtype))
