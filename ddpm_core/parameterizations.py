"""What a network predicts: eps, x_0, v and what is affine in them, each with the name that a model's config.json
has."""

from ddpm_core.denoiser import NetworkDenoiser, Precision, Prediction
from ddpm_core.errors import ConfigError
from ddpm_core.networks.unet import UNet
from ddpm_core.process.base import Coefficient, Images, Marginal, Process, factor

# Of images in [-1, 1] (Karras 2022, table 1).
SIGMA_DATA = 0.5


class EpsDenoiser(NetworkDenoiser):
    """The network predicts eps (Ho 2020, eq. 14). Raises ConfigError for a process that ends at SNR 0, where eps is
    z."""

    holds = "eps"

    def __init__(self, network: UNet, process: Process, precision: Precision = "fp32") -> None:
        super().__init__(network, process, precision)
        if process.prior_signal == 0.0:
            raise ConfigError(
                "schedule.zero_terminal_snr: True leaves nothing of the image at the last time step, where eps says "
                "nothing of it; predict v or x_0"
            )

    def read(self, z_t: Images, marginal: Marginal, output: Images) -> Prediction:
        """See `NetworkDenoiser`."""
        return Prediction.of_eps(z_t, marginal, output)


class ResidualEpsDenoiser(EpsDenoiser):
    """The network predicts eps - z (Kingma 2021, VDM, app. C): at noisy times eps is nearly z itself, which a network
    that starts at 0 starts from."""

    def read(self, z_t: Images, marginal: Marginal, output: Images) -> Prediction:
        """See `NetworkDenoiser`."""
        return Prediction.of_eps(z_t, marginal, z_t + output)


class X0Denoiser(NetworkDenoiser):
    """The network predicts x_0 (Ho 2020, sec. 3.2)."""

    holds = "x_0"

    def read(self, z_t: Images, marginal: Marginal, output: Images) -> Prediction:
        """See `NetworkDenoiser`."""
        return Prediction.of_x_0(z_t, marginal, output)


class VDenoiser(NetworkDenoiser):
    """The network predicts v = alpha eps - sigma x_0 (Salimans and Ho 2022, sec. 4)."""

    holds = "x_0"

    def read(self, z_t: Images, marginal: Marginal, output: Images) -> Prediction:
        """See `NetworkDenoiser`."""
        return Prediction.of_v(z_t, marginal, output)

    def target_weight(self, marginal: Marginal) -> Coefficient:
        """(alpha^2 + sigma^2)^2 / sigma^2, which is SNR + 1 of a variance-preserving process (Salimans and Ho 2022,
        sec. 4)."""
        return (marginal.alpha.square() + marginal.sigma.square()).square() / marginal.sigma.square()


class EdmDenoiser(NetworkDenoiser):
    """x_0 = c_skip y + c_out F(c_in y) with y = z / alpha and its noise s = sigma / alpha (Karras 2022, eq. 7 and table
    1):

    c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), c_in = 1 / sqrt(s^2 + d^2), d = `SIGMA_DATA`; here each
    in alpha, sigma and N = sigma^2 + alpha^2 d^2, the variance of z, which stay finite where alpha is 0. c_noise, there
    ln(s) / 4, is what the process gives as conditioning: in continuous time ln s, too, between its ends.
    """

    holds = "x_0"

    def scaled(self, z_t: Images, marginal: Marginal) -> Images:
        """c_in y = z / sqrt(N)."""
        return factor(_variance(marginal).rsqrt(), z_t) * z_t

    def read(self, z_t: Images, marginal: Marginal, output: Images) -> Prediction:
        """See `NetworkDenoiser`; c_skip y = alpha d^2 / N z, c_out = sigma d / sqrt(N)."""
        variance = _variance(marginal)
        skip, out = marginal.alpha * SIGMA_DATA**2 / variance, marginal.sigma * SIGMA_DATA * variance.rsqrt()
        return Prediction.of_x_0(z_t, marginal, factor(skip, z_t) * z_t + factor(out, z_t) * output)

    def target_weight(self, marginal: Marginal) -> Coefficient:
        """1 / c_out^2, Karras's lambda(sigma)."""
        return _variance(marginal) / (marginal.sigma * SIGMA_DATA).square()


def _variance(marginal: Marginal) -> Coefficient:
    """N, of z where the data's standard deviation is `SIGMA_DATA`."""
    return marginal.sigma.square() + (marginal.alpha * SIGMA_DATA).square()


DENOISERS: dict[str, type[NetworkDenoiser]] = {
    "eps": EpsDenoiser,
    "x_0": X0Denoiser,
    "v": VDenoiser,
    "residual_eps": ResidualEpsDenoiser,
    "edm": EdmDenoiser,
}


def denoiser_named(name: str) -> type[NetworkDenoiser]:
    """One of `DENOISERS`. Raises ConfigError for another name."""
    if name not in DENOISERS:
        raise ConfigError(f"denoiser: {name!r:.100} is not one of {sorted(DENOISERS)}")
    return DENOISERS[name]
