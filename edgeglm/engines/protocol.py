"""The protocol that every engine keeps: load, then infer, then close.

    with OnnxRuntimeEngine(path, threads=2) as engine:
        embedding = engine.infer({"pixels": pixels})["embedding"]

An engine declares the names, shapes and dtypes it takes and gives; feeds that break the declaration
raise UserError before the backend sees them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
E = TypeVar("E", bound="Engine")


class OutputsError(UserError):
    """A model gives what it does not declare, whatever it was fed."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One declared input or output.

    Attributes:
        name: Its name in the graph.
        dtype: The numpy name of its dtype, such as ``"float32"``.
        shape: Its dimensions: an int is fixed, a str is dynamic and the same wherever the name
            recurs, None is dynamic with no name.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        """Return ``pixels float32[B, 3, 80, 80]``."""
        return f"{self.name} {self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


class Engine(ABC):
    """Base of all backends. A subclass fills ``load``, ``close``, ``_run`` and the two declarations.

    Attributes:
        exact_shapes: Whether calls of the very shapes that it was made for are quicker than any near
            them, so that a caller with length buckets fills up to the bucket's length.
    """

    name: str
    exact_shapes: bool = False

    @property
    def bucket_batches(self) -> tuple[int, ...]:
        """Batch sizes that it was made for, worth a call each before it serves; usually none."""
        return ()

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``infer`` takes. Known once loaded."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``infer`` gives. Known once loaded."""

    @abstractmethod
    def load(self) -> None:
        """Read the model and take its resources; a second call does nothing. Raises UserError."""

    @abstractmethod
    def close(self) -> None:
        """Give the resources back; a second call does nothing."""

    @abstractmethod
    def _run(self, feeds: Feeds) -> list[Array]:
        """Return the outputs, in order, for feeds that keep the declaration.

        In arrays that no later call changes: a runner cuts them apart while the next call runs.
        """

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Return ``{output name: array}`` for one batch.

        Raises UserError when a name, a dtype or a shape breaks the declaration.
        """
        check_feeds(self.inputs, feeds, self.name)
        return self.infer_checked(feeds)

    def infer_checked(self, feeds: Feeds) -> dict[str, Array]:
        """Return what ``infer`` does, without a look at feeds that are known to keep the declaration."""
        results = self._run(feeds)
        outputs = self.outputs
        if len(results) != len(outputs):
            raise OutputsError(
                f"{self.name} declares {len(outputs)} outputs ({_listed(outputs)}) and gave {len(results)}; "
                "export the model again"
            )
        return {spec.name: result for spec, result in zip(outputs, results, strict=True)}

    def __enter__(self: E) -> E:
        self.load()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Feeds, engine: str) -> None:
    """Raise UserError at the first feed that breaks the declared names, dtypes or shapes.

    A symbolic dimension must have one size wherever its name recurs among the inputs.
    """
    given: object = feeds  # whatever a caller without types may give
    if not isinstance(given, Mapping):
        raise UserError(
            f"{engine}: the feeds are a {type(given).__name__}; give {{input name: array}}, "
            f"it takes {_listed(specs)}"
        )
    expected = {spec.name for spec in specs}
    if missing := sorted(expected - set(feeds)):
        raise UserError(f"{engine}: no feed for {', '.join(missing)}; it takes {_listed(specs)}")
    if extra := sorted(map(str, set(feeds) - expected)):
        raise UserError(f"{engine}: no input is named {', '.join(extra)}; it takes {_listed(specs)}")
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        array = feeds[spec.name]
        if not isinstance(array, np.ndarray):
            raise UserError(f"{engine}: {spec.name} is a {type(array).__name__}; feed a numpy array")
        if not _is_named(array.dtype, spec.dtype):
            raise UserError(
                f"{engine}: {spec.name} is {_words(array.dtype)}, expected {spec}; "
                f"convert it with .astype('{spec.dtype}')"
            )
        if len(array.shape) != len(spec.shape):
            raise UserError(
                f"{engine}: {spec.name} has shape {array.shape}, expected {spec}; "
                f"give it {len(spec.shape)} dimensions"
            )
        _check_dimensions(spec, array.shape, sizes, engine)


@cache
def _is_named(dtype: np.dtype[Any], name: str) -> bool:
    """Compare a dtype by name, once for each pair: numpy makes up the name anew each time, in Python.

    One of the other byte order has the same name, and an engine would take its bytes for other numbers.
    """
    return bool(dtype.name == name and dtype.isnative)


def _words(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else f"{dtype.name} of another machine's byte order"


def _check_dimensions(
    spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]], engine: str
) -> None:
    for axis, (size, declared) in enumerate(zip(shape, spec.shape, strict=True)):
        if size == 0:
            raise UserError(f"{engine}: {spec.name} is empty along axis {axis}; feed at least one sample")
        if isinstance(declared, int) and size != declared:
            raise UserError(
                f"{engine}: {spec.name} has shape {shape}, expected {spec}; make axis {axis} {declared} long"
            )
        if isinstance(declared, str):
            seen, where = sizes.setdefault(declared, (size, spec.name))
            if seen != size:
                raise UserError(
                    f"{engine}: {declared} is {seen} in {where} and {size} in {spec.name}; make them equal"
                )


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(str(spec) for spec in specs)
