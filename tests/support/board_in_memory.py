"""A board of stop requests in this process's memory."""


class Entries:
    """A `pipelines.training.stop.Board`; `failures` operations raise first, as those of a store that is away."""

    def __init__(self, failures: int = 0) -> None:
        self.values: dict[str, str] = {}
        self.failures = failures

    def _maybe_fail(self) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("the store is away")

    def get(self, name: str) -> str | None:
        self._maybe_fail()
        return self.values.get(name)

    def put(self, name: str, value: str) -> None:
        self._maybe_fail()
        self.values[name] = value
