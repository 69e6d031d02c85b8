"""Which work is given to actors, and which this process does itself."""

import pytest

from pipelines.cluster.actor_pool import ActorPool, one_actor


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
    monkeypatch.setattr("pipelines.cluster.connection.is_named", lambda address: named)
    assert pool.unless_small(lambda: (shards, weights)) is (None if in_this_process else pool)


@pytest.mark.parametrize(
    ("pool", "named", "one"),
    [
        (ActorPool(3), False, None),
        (ActorPool(3, num_cpus=2), True, ActorPool(1, num_cpus=2)),
        (ActorPool((2, 4), num_gpus=0.5), False, ActorPool(1, num_gpus=0.5)),
    ],
)
def test_one_actor_is_started_for_gpus_and_on_a_named_cluster_alone(
    pool: ActorPool, named: bool, one: ActorPool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("pipelines.cluster.connection.is_named", lambda address: named)
    monkeypatch.setattr("pipelines.cluster.connection.connect", lambda address: calls.append("connect"))
    monkeypatch.setattr("pipelines.cluster.connection.disconnect", lambda: calls.append("disconnect"))
    with one_actor(pool) as found:
        assert found == one
        calls.append("work")
    assert calls == [*(["connect"] if one else []), "work", "disconnect"]
