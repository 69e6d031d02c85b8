"""Models of every kind are sampled: an image depends on (model, seed, id) alone, and on what the page says."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.model_kinds import KINDS
from support.sample_runs import tiny

from ddpm_core import counter_random
from ddpm_core.images import to_uint8
from ddpm_core.model import load_model
from ddpm_core.parameterizations import DENOISERS
from ddpm_core.process import PROCESSES
from ddpm_core.process.base import factor
from ddpm_core.process.continuous import ContinuousProcess
from ddpm_core.process.discrete import DiscreteProcess
from ddpm_core.samplers.base import sample
from ddpm_core.samplers.ddim import DDIM
from ddpm_core.samplers.ddpm import DDPM
from pipelines.cli.errors import ConfigError
from pipelines.models.find import find_model
from pipelines.models.used import UsedModel
from pipelines.sampling.job import sample as sample_job
from pipelines.sampling.request import SampleRequest, request_of
from pipelines.sampling.shard import SampleShards, Source, decode_shard, sample_batch
from pipelines.storage.location import Location

SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"name": "ddpm", "steps": 5, "eta": 0.0},
    "ddim": {"name": "ddim", "steps": 5, "eta": 0.5},
    "dpmpp_3m": {"name": "dpmpp_3m", "steps": 5, "eta": 0.0},
    "dpmpp_2m_sde": {"name": "dpmpp_2m_sde", "steps": 5, "eta": 0.0},
    "heun": {"name": "heun", "steps": 5, "eta": 0.0, "churn": 20.0},
}


def shards_of(root: Path, kind: str, **fields: Any) -> SampleShards:
    if not (root / "model").exists():
        KINDS[kind].save(root / "model")
    config = tiny(root, **{"num_images": 10, **fields})
    found, location = find_model(config.model, None, root), Location.parse(config.output)
    found.keep(location / "model")
    return SampleShards(location, request_of(config, load_model(config.model)), threads=1)


def request_for(root: Path, kind: str, clip_x_0: bool = True, **of_sampler: Any) -> SampleRequest:
    KINDS[kind].save(root / "model")
    config = tiny(root, sampler={"name": "ddpm", "steps": None, **of_sampler}, clip_x_0=clip_x_0)
    return request_of(config, load_model(root / "model"))


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        *itertools.product(KINDS, ("ddpm", "ddim")),
        *itertools.product(("eps", "v, zero terminal SNR", "vdm", "edm"), ("dpmpp_3m", "dpmpp_2m_sde", "heun")),
    ],
)
def test_an_image_is_the_same_in_every_shard_of_every_size_by_every_actor(
    tmp_path: Path, kind: str, sampler: str
) -> None:
    shards = shards_of(tmp_path, kind, sampler=SAMPLERS[sampler])
    one, other = shards(), shards()
    forward = [one(index).data for index in range(2)]
    assert [other(index).data for index in (1, 0)] == forward[::-1]
    images = dict(pair for content in forward for pair in decode_shard(content, "parquet"))
    smaller = shards_of(tmp_path, kind, sampler=SAMPLERS[sampler], shard_size=3)()
    assert dict(pair for index in range(4) for pair in decode_shard(smaller(index).data, "parquet")) == images
    assert sorted(images) == list(range(10))
    assert len(set(images.values())) == 10, "every image is another one"


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_a_step_is_keyed_by_its_time_or_in_continuous_time_by_its_number(
    tmp_path: Path, kind: str
) -> None:
    """Ho 2020, algorithm 2, on a sub-sequence: z of every step from the one before, with the page's counters."""
    request = request_for(tmp_path, kind, steps=4, clip_x_0=False)
    model, ids, seen = load_model(tmp_path / "model"), torch.tensor([3, 4, 5]), []
    images = sample_batch(request, Source(model), ids, lambda k, z, x_0: seen.append(z.clone()))
    process = model.denoiser.process
    assert isinstance(request.sampler, DDPM)
    times = request.sampler.times(process)
    counters = [process.num_timesteps, *times.tolist()] if isinstance(process, DiscreteProcess) else [0, 1, 2, 3, 4]
    noises = [counter_random.normal(3, "sample", ids, counter, (1, 8, 8)) for counter in counters]
    torch.testing.assert_close(seen[0], noises[0] * process.prior_variance**0.5)
    steps = process.step(times, process.after(times))
    for k, z in enumerate(seen):
        step = steps[k : k + 1]
        prediction = model.denoiser(z, step.time.expand(3))
        z_s = prediction.posterior_mean(step)
        if k < 3 or isinstance(process, ContinuousProcess):
            z_s = z_s + factor(request.sampler.variance.of(step, prediction).sqrt(), z_s) * noises[k + 1]
        if k < 3:
            torch.testing.assert_close(seen[k + 1], z_s, rtol=1e-4, atol=1e-4)
        else:
            x = z_s / factor(step.then.alpha, z_s)
            assert np.abs(to_uint8(x).numpy().astype(int) - images).max() <= 1


@pytest.mark.parametrize("kind", ["vdm", "vdm, learned", "v, learned ends", "edm"])
def test_samples_in_continuous_time_end_in_the_most_probable_level(tmp_path: Path, kind: str) -> None:
    """Kingma 2021, VDM: the k that maximises p(k | z_0), in proportion exp(-(z_0 / alpha_0 - x_k)^2 e^-gamma_0 / 2)."""
    request = request_for(tmp_path, kind, steps=3)
    model, ids, seen = load_model(tmp_path / "model"), torch.arange(3), []
    images = sample_batch(request, Source(model), ids, lambda k, z, x_0: seen.append(z))
    process = model.denoiser.process
    assert isinstance(process, ContinuousProcess)
    times = request.sampler.times(process)
    assert float(process.after(times)[-1]) == pytest.approx(process.ends[0])
    step = process.step(times, process.after(times))[2:3]
    z_0 = model.denoiser(seen[-1], step.time.expand(3)).clipped().posterior_mean(step).double()
    z_0 += step.posterior_variance.sqrt() * counter_random.normal(3, "sample", ids, 3, (1, 8, 8))
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
    log_p = -0.5 * (z_0[..., None] / step.then.alpha - levels).square() * np.exp(-process.ends[0])
    expected = log_p.argmax(-1)[:, 0].numpy()
    assert (np.abs(expected - images[..., 0]) <= 1).all()
    assert (expected == images[..., 0]).mean() > 0.98, "but where float32 lies on the edge between two"


@pytest.mark.parametrize(
    ("kind", "fields", "sampler", "steps"),
    [
        ("eps", {}, DDPM, 20),
        ("eps", {"steps": 7}, DDPM, 7),
        ("eps", {"name": "ddim"}, DDIM, 20),
        ("vdm", {}, DDPM, 250),
        ("vdm", {"steps": 1000}, DDPM, 1000),
        ("edm", {"name": "ddim"}, DDIM, 50),
    ],
)
def test_steps_follow_the_model(tmp_path: Path, kind: str, fields: Any, sampler: type, steps: int) -> None:
    request = request_for(tmp_path, kind, **fields)
    assert (type(request.sampler), request.steps) == (sampler, steps)
    assert len(request.sampler.times(load_model(tmp_path / "model").denoiser.process)) == steps


@pytest.mark.parametrize(
    ("kind", "asked", "settled"),
    [
        ("eps", "auto", "beta_tilde"),
        ("eps", "beta", "beta"),
        ("v, zero terminal SNR", "auto", "beta_tilde"),
        ("learned variances", "auto", "learned"),
        ("learned variances", "learned", "learned"),
        ("learned variances", "beta_tilde", "beta_tilde"),
        ("vdm", "auto", "beta_tilde"),
        ("edm", "beta_tilde", "beta_tilde"),
    ],
)
def test_the_variance_is_settled_and_stored_by_name(tmp_path: Path, kind: str, asked: str, settled: str) -> None:
    request = request_for(tmp_path, kind, sigma2=asked, steps=4)
    assert request.to_json()["sigma2"] == settled
    assert request.described_sampler == f"ddpm, 4 steps, σ² = {settled}"
    assert SampleRequest.from_json(request.to_json(), Location.parse("/out/manifest.json")) == request


@pytest.mark.parametrize(
    ("kind", "fields", "line"),
    [
        (
            "eps",
            {"sigma2": "learned"},
            "sampler.sigma2: 'learned' needs a model that predicts its variances; take",
        ),
        ("vdm", {"sigma2": "learned"}, "sampler.sigma2: 'learned' is no variance of a continuous process"),
        ("vdm", {"sigma2": "beta"}, "sampler.sigma2: 'beta' is no variance of a continuous process"),
        ("edm", {"sigma2": "beta"}, "sampler.sigma2: 'beta' is no variance of a continuous process"),
        ("eps", {"steps": 21}, "sampler.steps = 21: the model has 20 diffusion steps; ask for at most as many"),
        ("v", {"name": "ddim", "steps": 21}, "sampler.steps = 21: the model has 20 diffusion steps"),
    ],
)
def test_what_the_model_does_not_have_is_refused(tmp_path: Path, kind: str, fields: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}[^\n]*$"):
        request_for(tmp_path, kind, **fields)


def test_all_steps_are_the_same_whether_they_are_named_or_not(tmp_path: Path) -> None:
    """Stored sample sets hold the number, and were made without it."""
    request = request_for(tmp_path, "eps", steps=20)
    assert request == request_for(tmp_path, "eps")
    model, ids = load_model(tmp_path / "model"), torch.arange(3)
    images = to_uint8(sample(model.denoiser, DDPM(request.sampler.variance), ids, 3)).numpy()
    np.testing.assert_array_equal(images, sample_batch(request, Source(model), ids))


@pytest.mark.parametrize("kind", ["learned variances", "v, zero terminal SNR", "vdm", "edm"])
def test_a_dry_run_measures_and_writes_nothing(tmp_path: Path, kind: str) -> None:
    KINDS[kind].save(tmp_path / "model")
    config = tiny(tmp_path, sampler={"name": "ddpm", "steps": None}, dry_run=True)
    rows = dict(sample_job(replace(config, cluster=type(config.cluster)())).rows)
    sigma2 = "learned" if kind == "learned variances" else "beta_tilde"
    steps = 250 if kind in ("vdm", "edm") else 20
    assert rows["sampler"] == f"ddpm, {steps} steps, σ² = {sigma2}: {steps} evaluations per image"
    assert rows["measured"].endswith("ms per call on one worker")
    assert rows["model"].endswith(f", {KINDS[kind].told}")
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_found_and_described_with_its_kind(tmp_path: Path, kind: str) -> None:
    model_id = KINDS[kind].save(tmp_path / "model")
    used = UsedModel.read(Location.parse(tmp_path / "out"), str(tmp_path / "model"), None, tmp_path)
    assert used.model.model_id == model_id
    assert used.described == (
        f"{tmp_path}/model (step 7, bits/dim not on record, id {model_id[:12]}), {KINDS[kind].told}"
    )
    weights = used.model.denoiser.named_weights()
    for name, parameter in KINDS[kind].build().named_weights().items():
        assert torch.equal(parameter, weights[name]), name
    assert used.model.denoiser.process.to_config() == KINDS[kind].process().to_config()


def test_the_way_from_noise_can_be_seen_where_the_variance_explodes(tmp_path: Path) -> None:
    """x_t of EDM has a deviation of 80 at first: undivided it would be black and white."""
    from PIL import Image

    shards = shards_of(tmp_path, "edm", sampler=SAMPLERS["ddim"])
    shards()(0)
    sheet = np.asarray(Image.open(tmp_path / "samples" / "preview" / "trajectory.png"))
    scale = sheet.shape[1] // (5 * 9 + 1)
    noise = sheet[::scale, ::scale][1:9, 1:9]
    assert ((noise > 0) & (noise < 255)).mean() > 0.5


def test_there_is_a_model_here_of_every_denoiser_and_process() -> None:
    assert {kind.denoiser for kind in KINDS.values()} == set(DENOISERS)
    names = {kind.process().to_config()["name"] for kind in KINDS.values()}
    assert names == set(PROCESSES) - {"table"}, "whose tables are any betas"
