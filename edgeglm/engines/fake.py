"""An engine for tests: it keeps the protocol, computes what it is told to, and can fail on demand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from edgeglm.core.errors import UserError
from edgeglm.engines.protocol import Array, Engine, Feeds, TensorSpec


class FakeEngine(Engine):
    """An engine without a model.

    Args:
        inputs: What it declares to take.
        outputs: What it declares to give.
        function: Computes the outputs, in order, from the feeds.
        seconds: How long each call takes at the least.
        failures: Errors raised by the first calls, one each.
        name: What errors call it.
    """

    def __init__(
        self,
        *,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        function: Callable[[Feeds], Sequence[Array]],
        seconds: float = 0.0,
        failures: Sequence[Exception] = (),
        name: str = "fake",
    ) -> None:
        self.name = name
        self.calls: list[dict[str, tuple[int, ...]]] = []
        self.loaded = False
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._function = function
        self._seconds = seconds
        self._failures = list(failures)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it was told to declare."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it was told to declare."""
        return self._outputs

    def load(self) -> None:
        """Note that it was loaded."""
        self.loaded = True

    def close(self) -> None:
        """Note that it was closed."""
        self.loaded = False

    def _run(self, feeds: Feeds) -> list[Array]:
        if not self.loaded:
            raise UserError(f"{self.name} is not loaded; open it with 'with'")
        self.calls.append({name: array.shape for name, array in feeds.items()})
        if self._failures:
            raise self._failures.pop(0)
        if self._seconds:
            time.sleep(self._seconds)
        return list(self._function(feeds))
