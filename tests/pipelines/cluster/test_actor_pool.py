"""Which work is given to actors, and which this process does itself."""

import pytest

from pipelines.cluster.actor_pool import ActorPool


@pytest.mark.parametrize(
    ("pool", "shards", "weights", "named", "in_this_process"),
    [
        (ActorPool(), 2, 1e9, False, True),
        (ActorPool(num_cpus=4), 2, 1e9, False, True),
        (ActorPool(), 2, 1e15, False, False),
        (ActorPool(), 1, 1e15, False, True),
        (ActorPool(), 1, 1e15, True, False),
        (ActorPool(), 2, 1e9, True, False),
        (ActorPool(1), 2, 1e9, False, False),
        (ActorPool((1, 4)), 2, 1e9, False, False),
        (ActorPool(num_gpus=0.5), 2, 1e9, False, False),
    ],
)
def test_little_work_that_nobody_asked_actors_for_needs_none(
    pool: ActorPool, shards: int, weights: float, named: bool, in_this_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.cluster.actor_pool.is_named", lambda address: named)
    assert pool.unless_small(lambda: (shards, weights)) is (None if in_this_process else pool)
