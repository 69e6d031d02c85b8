"""The importance of time steps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.evaluate_runs import evaluate_request
from support.sample_runs import save_tiny_model

from ddpm_core.likelihood.designs import timestep_proposal
from ddpm_core.model import load_model
from pipelines.data.dataset import PreparedDataset
from pipelines.evaluation.first_pass import measured_proposal


def test_the_measured_proposal_is_a_distribution_of_its_own(
    make_dataset: Callable[..., PreparedDataset], tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model")
    model = load_model(tmp_path / "model")
    request = evaluate_request(estimator="importance", batch_size=64)
    found = measured_proposal(model, make_dataset(70), request)
    plain = timestep_proposal(model.denoiser.process).numpy()
    assert found.shape == (19,)
    assert found.sum() == pytest.approx(1.0)
    assert (found >= 0.2 * plain).all()
    assert np.abs(found - plain).max() > 0.01
    assert (found == measured_proposal(model, make_dataset(70, name="again"), request)).all()
