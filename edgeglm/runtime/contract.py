"""What one tower takes and gives, for one sample: checks, buckets, and the way into a batch and out of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.protocol import Engine, TensorSpec, check_feeds
from edgeglm.runtime.plain import make_plain
from edgeglm.runtime.requests import Array, EngineFailedError, Failure, Request, Results, Sample, is_finite

_MUCH = 2**21  # bytes, of which looking for NaN would hold the event loop up for more than about 0.3 ms

_KEPT = 512  # signatures of samples that were checked; then all are forgotten

Signature = tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
Prepare = Callable[[Sequence[object]], "Sequence[Sample | EdgeglmError]"]


@dataclass(frozen=True, kw_only=True)
class TowerSource:
    """How a runner comes by one tower.

    Attributes:
        engine: Makes an engine that is not loaded yet. Called once an instance, and again for each
            instance that must be replaced.
        prepare: Turns raw inputs into samples, or into the errors of those that cannot be; called in a
            pool. None for a tower that takes arrays only.
        ragged: ``{input: value}`` for inputs whose axis 1 differs from sample to sample; they are
            filled up with the value to the longest in the batch.
        length_buckets: Ragged samples share a batch up to each of these lengths, so that a short one
            is not padded to the longest of all. The last one is the most that is taken.
        pad_to_bucket: Fill up to the bucket's length, for engines with one graph a shape.
        largest: ``{input: value}`` for inputs of whole numbers that may hold 0 to that value: an engine may
            read beyond a table, or count from its end, without a word. What ``prepare`` made always fits.
    """

    engine: Callable[[], Engine]
    prepare: Prepare | None = None
    ragged: Mapping[str, int] = field(default_factory=dict)
    length_buckets: tuple[int, ...] = ()
    pad_to_bucket: bool = False
    largest: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_plain(self)
        if self.ragged and not self.length_buckets:
            raise UserError("a tower with ragged inputs has no length buckets; give at least one length")
        if not all(isinstance(length, int) for length in self.length_buckets):
            raise UserError(
                f"length buckets {self.length_buckets} are no whole numbers; give such as (8, 16)"
            )
        if (
            list(self.length_buckets) != sorted({*self.length_buckets})
            or min(self.length_buckets, default=1) < 1
        ):
            raise UserError(f"length buckets {self.length_buckets} do not rise from 1; sort them")


class TowerContract:
    """The declared inputs and outputs of a loaded tower, read for single samples.

    Raises UserError for an engine whose inputs cannot be batched along axis 0.
    """

    def __init__(self, name: str, engine: Engine, source: TowerSource) -> None:
        self.name = name
        self.inputs = engine.inputs
        self.outputs = engine.outputs
        self.source = source
        self._whole_length = source.pad_to_bucket or engine.exact_shapes
        self._filled_alone = self._whole_length and bool(source.ragged)
        for spec in self.inputs:
            if not spec.shape or isinstance(spec.shape[0], int):
                raise UserError(
                    f"{engine.name}: axis 0 of {spec} is fixed, so requests cannot share a call; "
                    "export it with a dynamic batch axis"
                )
        for spec in self.inputs:
            if spec.name in source.ragged and len(spec.shape) < 2:
                raise UserError(f"{engine.name}: {spec} has no axis 1 to be ragged; leave it out of ragged")
        if unknown := {*source.ragged, *source.largest} - {spec.name for spec in self.inputs}:
            raise UserError(f"{engine.name} has no input {', '.join(sorted(unknown))}; name one it takes")
        self._fixed = [
            (spec.name, np.dtype(spec.dtype), spec.shape[1:])
            for spec in self.inputs
            if all(isinstance(size, int) for size in spec.shape[1:])
        ]
        self._only = self._fixed[0] if len(self._fixed) == len(self.inputs) == 1 else None
        self._names = [spec.name for spec in self.inputs]
        self._all_fixed = len(self._fixed) == len(self.inputs)
        self._known: dict[Signature, tuple[int, object]] = {}

    def place(self, request: Request) -> None:
        """Set the length and bucket of a request's sample. Raises UserError for one that does not fit."""
        sample = request.sample
        assert sample is not None
        self._place(request, sample)
        if self.source.largest and request.raw is None:
            self._check_range(sample)

    def _place(self, request: Request, sample: Sample) -> None:
        if self._only is not None and type(sample) is dict and len(sample) == 1:
            name, dtype, shape = self._only
            array = sample.get(name)
            if type(array) is np.ndarray and array.dtype == dtype and array.shape == shape:
                return
        elif self._all_fixed and type(sample) is dict and len(sample) == len(self._fixed):
            for name, dtype, shape in self._fixed:
                array = sample.get(name)
                if type(array) is not np.ndarray or array.dtype != dtype or array.shape != shape:
                    break
            else:
                return
        elif type(sample) is dict and len(sample) == len(self._names):
            signature = tuple(
                [(name, a.dtype, a.shape) for name, a in sample.items() if type(a) is np.ndarray]
            )
            known = self._known.get(signature)
            if known is not None:
                request.length, request.bucket = known
                return
            self._place_slowly(request, sample)
            if len(signature) == len(sample):
                if len(self._known) >= _KEPT:
                    self._known.clear()
                self._known[signature] = request.length, request.bucket
            return
        self._place_slowly(request, sample)

    def _place_slowly(self, request: Request, sample: Sample) -> None:
        if not isinstance(sample, Mapping):
            raise UserError(f"{self.name}: a sample is a {type(sample).__name__}; give {{input name: array}}")
        for name, array in sample.items():
            if not isinstance(array, np.ndarray):
                raise UserError(f"{self.name}: {name} is a {type(array).__name__}; feed a numpy array")
            # An engine does not see a mask, but what is under it. To name numpy.ma is to import it, which
            # takes longer than many an answer: not for a plain array.
            if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
                raise UserError(f"{self.name}: {name} is a masked array; feed what .filled(...) makes of it")
        feeds = {name: array[None] for name, array in sample.items()}
        check_feeds(self.inputs, feeds, f"tower {self.name!r}, one sample with a batch axis added")
        free = []
        lengths = {name: sample[name].shape[0] for name in self.source.ragged}
        if len({*lengths.values()}) > 1:  # or the rows of a batch would shift into those of other callers
            told = ", ".join(f"{length} in {name}" for name, length in lengths.items())
            raise UserError(f"tower {self.name!r}: one sample is {told}; make them equally long")
        for spec in self.inputs:
            shape = sample[spec.name].shape
            for axis, declared in enumerate(spec.shape[1:]):
                if spec.name in self.source.ragged and axis == 0:
                    request.length = shape[0]
                elif not isinstance(declared, int):
                    free.append(shape[axis])
        request.bucket = (self.bucket_length(request.length), *free) if self.source.ragged else tuple(free)

    def _check_range(self, sample: Sample) -> None:
        for name, largest in self.source.largest.items():
            array = sample[name]
            if array.size and (array.max() > largest or array.min() < 0):
                wrong = array[(array > largest) | (array < 0)].flat[0]
                raise UserError(
                    f"tower {self.name!r}: {name} holds {wrong}; give whole numbers from 0 to {largest}"
                )

    def bucket_length(self, length: int) -> int:
        """Return the length of the bucket that ``length`` falls in. Raises UserError if none holds it."""
        buckets = self.source.length_buckets
        at = bisect_left(buckets, length)
        if at == len(buckets):
            raise UserError(
                f"tower {self.name!r} takes at most {buckets[-1]} along its ragged axis, got {length}; cut it"
            )
        return buckets[at]

    def feeds(self, requests: Sequence[Request]) -> dict[str, Array]:
        """Join samples of one bucket into ``{input: [N, ...]}``, ragged ones filled up."""
        if len(requests) == 1 and not self._filled_alone:
            sample = requests[0].sample
            assert sample is not None
            return {name: _alone(sample[name]) for name in self._names}
        samples = [request.sample for request in requests]
        used = None
        if self.source.ragged:
            lengths = np.array([request.length for request in requests])
            longest = lengths.max()
            if self._whole_length:
                longest = self.bucket_length(int(longest))
            used = np.arange(longest) < lengths[:, None]
        feeds: dict[str, Array] = {}
        for spec in self.inputs:
            rows = [sample[spec.name] for sample in samples if sample is not None]
            if used is not None and spec.name in self.source.ragged:
                batch = np.full((*used.shape, *rows[0].shape[1:]), self.source.ragged[spec.name], spec.dtype)
                batch[used] = np.concatenate(rows)
            elif rows[0].ndim:
                batch = np.concatenate(rows).reshape(len(rows), *rows[0].shape)
            else:
                batch = np.array(rows, spec.dtype)
            feeds[spec.name] = batch
        return feeds

    def results(
        self, requests: Sequence[Request], feeds: Mapping[str, Array], outputs: Mapping[str, Array]
    ) -> Results:
        """Make the results of a call. The loop looks for NaN while the next call runs, unless there is much.

        Raises EngineFailedError for a wrong number of rows.
        """
        size, kept = 0, {}
        for name, array in outputs.items():
            if not array.ndim or len(array) != len(requests):
                raise EngineFailedError(
                    f"tower {self.name!r} gave {name} of shape {list(array.shape)} for {len(requests)} "
                    "samples; export the model again"
                )
            size += array.nbytes
            if isinstance(array.base, np.ndarray):  # part of a buffer that the next call may fill
                kept[name] = array.copy()
        if kept:
            outputs = {**outputs, **kept}
        outside = None
        if requests[0].raw is None or any(request.raw is None for request in requests):
            outside = feeds
            for array in feeds.values():
                size += array.nbytes
        results = Results(requests, outputs, (), outside, False)
        return self.looked_over(results) if size > _MUCH else results

    def looked_over(self, results: Results) -> Results:
        """Return results of which whoever met NaN or infinity has failed, and nobody else.

        A row of the answer that holds them fails alone. Of a batch that was fed with them no other row can
        be trusted: what an engine makes of one sample may depend on the largest number of the batch. The
        others are then in ``again``.
        """
        requests, outputs, feeds = results.answered, results.outputs, results.feeds
        if feeds is not None and not all(map(is_finite, feeds.values())):
            failures = self.not_finite(requests)
            if failures:
                bad = {failure.request for failure in failures}
                again = [request for request in requests if request not in bad]
                return Results((), {}, [*results.failures, *failures], again=again)
        if all(map(is_finite, outputs.values())):
            return Results(requests, outputs, results.failures)
        failures, good = [*results.failures], []
        for row, request in enumerate(requests):
            names = [name for name, array in outputs.items() if not is_finite(array[row])]
            if not names:
                good.append(row)
                continue
            error = EngineFailedError(
                f"tower {self.name!r} gave NaN or infinity in {', '.join(names)} for this input; "
                "look at the input, or run 'edgeglm verify --run' on the bundle"
            )
            failures.append(Failure(request, error))
        kept = {name: array[good] for name, array in outputs.items()}
        return Results([requests[row] for row in good], kept, failures)

    def not_finite(self, requests: Sequence[Request]) -> list[Failure]:
        """Return the failures of those whose arrays, from outside, hold NaN or infinity; usually none."""
        found = []
        for request in requests:
            if request.raw is not None or request.sample is None:
                continue
            bad = [name for name, array in request.sample.items() if not is_finite(array)]
            if bad:
                error = UserError(
                    f"{', '.join(bad)} for tower {self.name!r} holds NaN or infinity; feed finite numbers"
                )
                found.append(Failure(request, error))
        return found

    def warm_up_feeds(self, batch: int) -> list[dict[str, Array]]:
        """Make ones of each shape that is known beforehand: one set a length bucket, none if unknown."""
        if any(self._unknown(spec) for spec in self.inputs):
            return []
        lengths = self.source.length_buckets if self.source.ragged else (0,)
        return [
            {spec.name: np.ones(self._shape(spec, batch, length), spec.dtype) for spec in self.inputs}
            for length in lengths
        ]

    def _unknown(self, spec: TensorSpec) -> bool:
        fixed_from = 2 if spec.name in self.source.ragged else 1
        return any(not isinstance(size, int) for size in spec.shape[fixed_from:])

    def _shape(self, spec: TensorSpec, batch: int, length: int) -> tuple[int, ...]:
        rest = [size for size in spec.shape[1:] if isinstance(size, int)]
        ragged = spec.name in self.source.ragged
        return (batch, length, *rest) if ragged else (batch, *rest)


def _alone(array: Array) -> Array:
    """Return a batch of one: the caller's array itself, where an engine can take it."""
    return array[None] if array.flags.c_contiguous else array.copy()[None]
