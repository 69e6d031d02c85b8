"""A node that is about to be taken away: what its workers have done is saved while they can."""

from collections.abc import Callable


class Preemption:
    """Whether a checkpoint should be saved because a node of this training is being drained.

    Args:
        drained: Whether a node is, as all ranks agree; a collective.
    """

    def __init__(self, drained: Callable[[], bool]) -> None:
        self._drained, self._saved = drained, False

    def wants_checkpoint(self) -> bool:
        """Whether a node is being drained and none was when this was asked before. A collective."""
        drained = self._drained()
        wanted = drained and not self._saved
        self._saved = drained
        return wanted
