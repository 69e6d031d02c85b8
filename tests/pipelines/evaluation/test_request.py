"""What an evaluation's request is stored as: evaluations of before are found by it."""

import json
from typing import Any

import numpy as np
import pytest
from support.evaluate_runs import evaluate_request

from pipelines.cli.config import digest
from pipelines.cli.errors import DataError
from pipelines.data.hold_out import HoldOut
from pipelines.evaluation.config import OdeConfig
from pipelines.evaluation.request import EvaluateRequest
from pipelines.storage.location import Location

PATH = Location.parse("/out/manifest.json")
STORED: dict[str, Any] = {
    "model_id": "m" * 64,
    "dataset_id": "d" * 64,
    "estimator": "stratified",
    "timesteps_per_image": 8,
    "draws": None,
    "sigma2": "beta_tilde",
    "num_images": None,
    "target_halfwidth": None,
    "seed": 3,
    "dtype": "float32",
    "device": "cpu",
    "by_label": False,
    "train_dataset_id": None,
    "ode": {"num_images": 0, "steps": 64, "probes": 4},
    "batch_size": 24,
    "shard_size": 16,
}


@pytest.mark.parametrize(
    ("fields", "stored"),
    [
        ({}, {}),
        ({"estimator": "all", "timesteps_per_image": None, "draws": 2}, ...),
        ({"num_images": 5, "target_halfwidth": 0.1, "by_label": True, "train_dataset_id": "t" * 64}, ...),
        ({"ode": OdeConfig(3, 8, 2)}, {"ode": {"num_images": 3, "steps": 8, "probes": 2}}),
        ({"hold_out": HoldOut(70, 3)}, {"hold_out": {"num_rows": 70, "every": 3}}),
        ({"sigma2": "learned", "num_timesteps": 50}, ...),  # since then
    ],
)
def test_the_stored_values_are_those_of_version_1(fields: dict[str, Any], stored: Any) -> None:
    request = evaluate_request(**fields)
    assert request.to_json() == {**STORED, **(fields if stored is ... else stored)}
    assert EvaluateRequest.from_json(json.loads(json.dumps(request.to_json())), PATH) == request


def test_the_hashes_are_those_of_version_1() -> None:
    """As the code of before typed requests has computed them from the same fields."""
    held_out = evaluate_request(hold_out=HoldOut(70, 3))
    assert [digest(request.to_json())[:16] for request in (evaluate_request(), held_out)] == [
        "d8098ff7584445fb",
        "bbd2b1ca41c90a6e",
    ]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"estimator": "some"}, "request.estimator = 'some': must be one of all, stratified, importance"),
        ({"draws": 2}, "request = a dict: does not hold together .draws belong to the estimator `all`"),
        ({"timesteps_per_image": None}, "request = a dict: does not hold together .draws belong to the estimator"),
        ({"ode": {"num_images": 0, "steps": 5, "probes": 4}}, "request.ode = a dict: does not hold .*ode.steps = 5"),
        ({"hold_out": {"num_rows": 70}}, "request.hold_out.every = None: must be there"),
        ({"sigma2": "auto"}, "request.sigma2 = 'auto': must be one of beta, beta_tilde, learned"),
        ({"num_timesteps": "50"}, "request.num_timesteps = '50': must be a whole number or null"),
        ({"dataset": "x"}, "request.dataset = 'x': is not known to this version"),
    ],
)
def test_a_damaged_request_is_told_by_its_field(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=f"^/out/manifest.json: {told}") as refusal:
        EvaluateRequest.from_json({**STORED, **changed}, PATH)
    assert "\n" not in str(refusal.value)


def test_the_order_is_the_data_sets_own_unless_a_part_is_asked_for() -> None:
    assert evaluate_request().order(5).tolist() == [0, 1, 2, 3, 4]
    some, whole = (
        evaluate_request(**part).order(50).tolist() for part in ({"num_images": 9}, {"target_halfwidth": 0.1})
    )
    assert some == whole[:9] != sorted(some)
    assert sorted(whole) == list(range(50))
    held_out = HoldOut(70, 3)
    np.testing.assert_array_equal(evaluate_request(hold_out=held_out).order(70), held_out.ids)
    assert evaluate_request(hold_out=held_out).measured_on == held_out.name_of("d" * 64)
    assert evaluate_request().measured_on == "d" * 64
