"""What the two crews do with a batch: prepare raw inputs, and run engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.protocol import Engine
from edgeglm.runtime.contract import TowerContract, TowerSource
from edgeglm.runtime.requests import Array, EngineFailedError, Failure, Request, Results

Contracts = Mapping[str, TowerContract]


class EngineHandler:
    """Runs batches: owns one loaded engine a tower.

    Args:
        sources: The towers.
        warm_up_batches: Sizes of the batches of ones that each engine is called with before it serves.
        contracts: Filled with what the loaded engines declare.
        before_call: Called when a batch is ready, right before the engine is.
    """

    def __init__(
        self,
        sources: Mapping[str, TowerSource],
        warm_up_batches: Mapping[str, Sequence[int]],
        contracts: dict[str, TowerContract],
        *,
        before_call: Callable[[], None],
    ) -> None:
        self._before_call = before_call
        self._engines: dict[str, Engine] = {}
        self._contracts: dict[str, TowerContract] = {}
        with ExitStack() as resources:
            for name, source in sources.items():
                engine = resources.enter_context(source.engine())
                contract = TowerContract(name, engine, source)
                for size in _sizes(warm_up_batches[name], engine):
                    shapes = contract.warm_up_feeds(size)
                    # Where no shape has a context of its own, the longest of a full batch is all that is new.
                    free = size > 1 and size not in engine.bucket_batches
                    for feeds in shapes[-1:] if free else shapes:
                        _warm_up(name, engine, feeds, size)
                self._engines[name], self._contracts[name] = engine, contract
            self._resources = resources.pop_all()
        for name, contract in self._contracts.items():
            contracts.setdefault(name, contract)

    def run(self, batch: Sequence[Request]) -> Results:
        """Call the engine once for requests of one tower and bucket."""
        tower = batch[0].tower
        contract = self._contracts[tower]
        feeds = contract.feeds(batch)
        self._before_call()
        try:
            outputs = self._engines[tower].infer_checked(feeds)
        except BaseException:
            if failures := contract.not_finite(batch):  # theirs is the fault
                bad = {failure.request for failure in failures}
                again = [request for request in batch if request not in bad]
                return Results((), {}, failures, again=again)
            raise
        return contract.results(batch, feeds, outputs)

    def check(self) -> None:
        """Call each engine with one sample of ones, as far as its shapes are known."""
        self._before_call()
        for name, contract in self._contracts.items():
            for feeds in contract.warm_up_feeds(1):
                self._engines[name].infer(feeds)

    def close(self) -> None:
        """Close the engines."""
        self._resources.close()


def _warm_up(tower: str, engine: Engine, feeds: Mapping[str, Array], size: int) -> None:
    """Call an engine with ones. Raises UserError that names the setting which asked for such a batch."""
    try:
        engine.infer(feeds)
    except EdgeglmError as error:
        if size == 1:
            raise
        what = str(error).rpartition("; ")[0] or str(error)
        raise UserError(
            f"tower {tower!r} does not take a batch of {size}: {what}; lower max_batch_size"
        ) from error


def _sizes(asked: Sequence[int], engine: Engine) -> Sequence[int]:
    """Add to the batch sizes of a warm-up those that the engine was made for and that may come."""
    return sorted({*asked, *(size for size in engine.bucket_batches if asked and size <= max(asked))})


class PreparationHandler:
    """Makes samples of raw inputs."""

    def __init__(self, sources: Mapping[str, TowerSource], contracts: Contracts) -> None:
        self._sources = sources
        self._contracts = contracts

    def run(self, batch: Sequence[Request]) -> Results:
        """Prepare requests of one tower."""
        tower = batch[0].tower
        prepare = self._sources[tower].prepare
        assert prepare is not None, tower
        samples = prepare([request.raw for request in batch])
        if len(samples) != len(batch):
            raise EngineFailedError(
                f"{len(samples)} samples were made of {len(batch)} inputs for tower {tower!r}; "
                "mend its preparation"
            )
        ready, failures = [], []
        for request, sample in zip(batch, samples, strict=True):
            if isinstance(sample, EdgeglmError):
                failures.append(Failure(request, sample))
                continue
            request.sample = sample
            try:
                self._contracts[tower].place(request)
            except EdgeglmError as error:
                failures.append(Failure(request, error))
            else:
                ready.append(request)
        return Results(ready, {}, failures)

    def check(self) -> None:
        """Do nothing: there is nothing that could break."""

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


def forwarding(
    deliver: Callable[[Results], None], forward: Callable[[Sequence[Request]], None]
) -> Callable[[Results], None]:
    """Send prepared requests on to the next crew and the failed ones back."""

    def sort_out(results: Results) -> None:
        if results.answered:
            forward(results.answered)
        if results.failures:
            deliver(Results((), {}, results.failures))

    return sort_out
