"""A stage: one step with a typed config, declared inputs, and conditions before and after it.

The base class owns the call: it checks, looks the key up in the store, runs, checks again and
commits. A subclass writes ``requires``, ``run`` and ``ensures``, and keeps nothing on itself.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_file, sha256_json, sha256_listing
from edgeglm.core.progress import Progress
from edgeglm.core.store import Store

C = TypeVar("C", bound=msgspec.Struct)
Inputs = Mapping[str, Artifact]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every stage run may use. None of it changes a result, so none of it is in a key."""

    store: Store
    progress: Progress
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The artifact of a stage, and whether the store had it."""

    stage: str
    artifact: Artifact
    reused: bool
    seconds: float


class Stage(ABC, Generic[C]):
    """Base of all stages.

    Class attributes:
        name: The stage's name; also the kind of its artifact.
        code: Dotted names of the packages and modules whose source decides the result.
        libraries: Distributions whose versions decide the result.
    """

    name: ClassVar[str]
    code: ClassVar[tuple[str, ...]]
    libraries: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: C) -> None:
        self.config = config

    def requires(self, inputs: Inputs) -> None:
        """Raise UserError if the inputs cannot work. Cheap; runs before the store is asked."""

    @abstractmethod
    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Fill the empty folder ``out`` and return JSON-like measurements to record."""

    def ensures(self, inputs: Inputs, out: Path, measured: Mapping[str, Any]) -> None:
        """Raise if what ``run`` wrote must not be kept. Nothing is stored when it raises."""

    def key_parts(self, inputs: Inputs) -> dict[str, Any]:
        """Return everything that decides the result, as JSON-like data for hashing and explaining."""
        return {
            "stage": self.name,
            "config": msgspec.to_builtins(self.config),
            "inputs": {name: artifact.digest for name, artifact in sorted(inputs.items())},
            "code": {module: code_digest(module) for module in sorted({*self.code, "edgeglm.core.stage"})},
            "libraries": {name: _version(name) for name in sorted(self.libraries)},
        }

    def key(self, inputs: Inputs) -> str:
        """Return the full sha256 under which the result is stored."""
        return sha256_json(self.key_parts(inputs))

    def __call__(self, inputs: Inputs, context: Context) -> StageResult:
        """Return the stored result for these inputs, or make it."""
        started = time.perf_counter()
        self.requires(inputs)
        parts = self.key_parts(inputs)

        def write(out: Path) -> dict[str, Any]:
            measured = dict(self.run(inputs, out, context))
            self.ensures(inputs, out, measured)
            seconds = time.perf_counter() - started
            return {"key": parts, "measured": measured, "seconds": round(seconds, 3)}

        artifact, reused = context.store.put(sha256_json(parts), self.name, write)
        seconds = time.perf_counter() - started
        return StageResult(stage=self.name, artifact=artifact, reused=reused, seconds=seconds)


@cache
def code_digest(module: str) -> str:
    """Return the sha256 of the source of a module, or of every module of a package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"stage code {module!r} does not exist")
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        return sha256_file(origin)
    sources = sorted(origin.parent.rglob("*.py"))
    return sha256_listing({p.relative_to(origin.parent).as_posix(): sha256_file(p) for p in sources})


def changes(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield one line for each leaf that differs between two key parts, for ``edgeglm explain``."""
    for name in sorted({*before, *after}):
        where = f"{path}.{name}" if path else name
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, where)
        elif old != new:
            yield f"{where}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


@cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
