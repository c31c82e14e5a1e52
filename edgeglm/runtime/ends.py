"""How requests end: each exactly once, with a result or an error, in the event loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import EdgeglmError
from edgeglm.runtime.admission import Admission
from edgeglm.runtime.generation import Generation
from edgeglm.runtime.ledger import Event, Ledger
from edgeglm.runtime.requests import (
    Array,
    DeadlineExceededError,
    EngineFailedError,
    Failure,
    OverloadedError,
    Request,
    Results,
    late_text,
    rows_of,
    told,
)


class Ends:
    """Ends requests: tells their callers, frees their places and counts them. For one event loop."""

    def __init__(self, admission: Admission, ledger: Ledger) -> None:
        self._admission, self._ledger = admission, ledger

    def deliver(self, results: Results) -> None:
        """End requests as a crew says; the one hop back of a batch."""
        now = time.monotonic()
        try:
            if not results.seen:
                results = _home(results.answered[0]).looked_over(results)
            rows = rows_of(results)
        except Exception as error:  # too little memory: who was to be answered must not wait for ever
            failures = [*results.failures, *(_uncut(request, error) for request in results.answered)]
            results, rows = Results((), {}, failures, again=results.again), ()
        if results.again:
            _home(results.again[0]).resubmit(results.again)
        answered: list[Request] = []
        try:
            for request, answer in zip(results.answered, rows, strict=True):
                if not request.settled:
                    future = request.future
                    if future is not None and not future.done():
                        future.set_result(answer)
                    answered.append(request)
                    request.settled = True  # last: whom an error keeps from here is found and told later
                    if request.timer is not None:
                        request.timer.cancel()
        finally:
            if answered:
                _home(answered[0]).forget(answered)
                self._admission.release(len(answered))
                self._ledger.answered([now - request.started for request in answered])
        for failure in results.failures:
            late = isinstance(failure.error, DeadlineExceededError)
            self.fail(failure.request, failure.error, count="expired" if late else "failed")

    def fail(self, request: Request, error: EdgeglmError, count: Event = "failed") -> None:
        """End a request with an error, unless it has ended."""
        if request.settled:
            return
        if request.future is not None and not request.future.done():
            request.future.set_exception(error)
        self._settle(request)
        self._ledger.count(count)

    def expire(self, request: Request) -> None:
        """End a request whose deadline has passed, wherever it is, unless it has ended."""
        if not request.settled:
            _home(request).withdraw(request)
            self.fail(request, DeadlineExceededError(late_text(request, time.monotonic())), count="expired")

    def cancel(self, request: Request) -> None:
        """End a request whose caller has left, unless it has ended."""
        if not request.settled:
            self._settle(request)
            self._ledger.count("cancelled")
            _home(request).withdraw(request)

    def turn_away(self, event: Event) -> None:
        """Count the end of a request that never had a place."""
        self._ledger.count(event)
        self._ledger.count("turned_away")

    def _settle(self, request: Request) -> None:
        """Note that a request has ended, and give its place to the next. Its future is set before."""
        request.settled = True
        if request.timer is not None:
            request.timer.cancel()
        _home(request).forget((request,))
        self._admission.release()


def embedding(tower: str, outputs: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """Return the output of that name. Raises EngineFailedError for a tower that gives none."""
    if "embedding" not in outputs:
        raise EngineFailedError(
            f"tower {tower!r} gives {sorted(outputs)}, not 'embedding'; build the bundle again"
        )
    return np.asarray(outputs["embedding"], dtype=np.float32)


def overloaded(capacity: int) -> OverloadedError:
    """Return the error of a request that a full runner refuses."""
    return OverloadedError(f"the runner holds {capacity} requests already; try later, or raise its capacity")


def _uncut(request: Request, error: Exception) -> Failure:
    failure = EngineFailedError(
        f"the answer cannot be cut out of its batch: {told(error)}; "
        "lower max_batch_size, or leave this process more memory"
    )
    failure.__cause__ = error
    return Failure(request, failure)


def _home(request: Request) -> Generation:
    return cast("Generation", request.home)
