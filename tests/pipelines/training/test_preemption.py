"""A drained node is answered with one checkpoint."""

from pipelines.training.preemption import Preemption


def test_each_drained_node_wants_one_checkpoint_and_every_question_is_passed_on() -> None:
    drained = [False, True, True, False, True]
    asked = iter(drained)
    preemption = Preemption(lambda: next(asked))
    assert [preemption.wants_checkpoint() for _ in drained] == [False, True, False, False, True]
    assert list(asked) == []  # asking is a collective: it is never skipped
