"""The loop of every sampler: what is shown, what a sample depends on, clipping."""

import pytest
import torch
from support.denoisers import toy

from ddpm_core import counter_random
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import Clip, sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from ddpm_core.samplers.encode import encode, encoding_times
from ddpm_core.samplers.heun import Heun
from ddpm_core.samplers.start import STREAM


@pytest.mark.parametrize("clip", [None, Clip()])
def test_every_step_is_shown_with_its_input_and_prediction(clip):
    denoiser, ids = toy(DiscreteProcess.linear(20), (1, 4, 4)), torch.arange(3)
    for sampler, times in ((DDPM(), list(range(19, -1, -1))), (DDIM(4), [19, 13, 6, 0])):
        seen = []
        x = sample(denoiser, sampler, ids, 3, clip=clip, on_step=lambda *step, to=seen: to.append(step))
        assert sampler.times(denoiser.process).tolist() == times
        assert [k for k, _, _ in seen] == list(range(len(times)))
        assert torch.equal(seen[0][1], counter_random.normal(3, STREAM, ids, 20, (1, 4, 4)))
        torch.testing.assert_close(seen[-1][2], x, rtol=1e-5, atol=1e-5)
        assert torch.equal(sample(denoiser, sampler, ids, 3, clip=clip), x)


@pytest.mark.parametrize("sampler", [DDIM(4), Heun(4)])
def test_every_step_to_the_noise_is_shown_with_its_input_and_prediction(sampler):
    denoiser, x_0 = toy(DiscreteProcess.linear(20), (1, 4, 4)), torch.rand(3, 1, 4, 4) - 0.5
    seen = []
    z_T = encode(denoiser, sampler, x_0, None, on_step=lambda *step: seen.append(step))
    times = encoding_times(denoiser.process, sampler)[:-1]
    assert [k for k, _, _ in seen] == list(range(len(times)))
    torch.testing.assert_close(seen[0][1], denoiser.process.at(times[:1]).alpha.float() * x_0)
    for (_, z, shown), time in zip(seen, times, strict=True):
        assert torch.equal(shown, denoiser(z, time.expand(3)).x_0)
    assert torch.equal(encode(denoiser, sampler, x_0, None), z_T)


def test_a_sample_does_not_depend_on_its_batch():
    denoiser = toy(DiscreteProcess.linear(10), (3, 4, 4))
    for sampler in (DDPM(), DDIM(4, eta=0.7)):
        together = sample(denoiser, sampler, torch.arange(10, 15), 3)
        shuffled = sample(denoiser, sampler, torch.tensor([13, 2, 11]), 3)
        assert torch.equal(shuffled[0], together[3])
        assert torch.equal(shuffled[2], together[1])
        assert not torch.equal(sample(denoiser, sampler, torch.arange(10, 15), 4), together)


def test_clipped_samples_are_in_range():
    x = sample(toy(DiscreteProcess.linear(20), (1, 4, 4)), DDIM(7, eta=0.3), torch.arange(8), 0)
    assert float(x.abs().max()) <= 1.0
