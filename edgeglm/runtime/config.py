"""How a runner behaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeGuard

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.runtime.batch_queue import BatchPolicy
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.plain import make_plain
from edgeglm.runtime.towers import EngineMaker

WhenFull = Literal["wait", "shed"]


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """The settings of a runner.

    Published figures were measured with these defaults where their page names no other, but for ``threads``,
    which each row names.

    Attributes:
        variant: Which variant of a bundle; this board's choice or the bundle's default for None.
        instances: Engines a tower, each with a thread of its own that calls one at a time.
        threads: Threads inside an operator, for each engine.
        preparation_threads: Threads that tokenise and decode while engines run.
        batching: When requests become a batch: one policy for all towers, or one a tower.
        length_buckets: Lengths up to which texts share a batch, the last one that of the longest text; chosen
            from the bundle for None.
        capacity: The most requests held at a time, waiting and running together. Each keeps its prepared
            input: 0.6 MB for a picture of 224 px.
        when_full: ``wait`` lets a caller wait for a place; ``shed`` refuses at once with OverloadedError,
            unless a less urgent request waits, which is then refused in its stead.
        hang_after: Seconds after which a call is given up and its instance replaced.
        open_timeout: Seconds that an instance may take to load and warm up.
        max_replacements: How many instances may be replaced within an hour, or hang to this day, before the
            runner refuses to go on: each that hangs keeps a thread and an engine. As many threads that
            prepare, counted by themselves.
        drain_timeout: Seconds that ``close`` gives to the requests it holds; None for no limit.
        warm_up: Whether each engine is called with ones, of one sample and of a full batch, before it
            serves.
        engine: Makes an engine from (ONNX file, threads). None for what ``edgeglm finalize`` chose on this
            board, or ONNX Runtime where it was not run.
    """

    variant: str | None = None
    instances: int = 1
    threads: int = 2
    preparation_threads: int = 2
    batching: BatchPolicy | Mapping[str, BatchPolicy] = field(default_factory=BatchPolicy)
    length_buckets: tuple[int, ...] | None = None
    capacity: int = 1024
    when_full: WhenFull = "wait"
    hang_after: float = 10.0
    open_timeout: float = 120.0
    max_replacements: int = 8
    drain_timeout: float | None = 30.0
    warm_up: bool = True
    engine: EngineMaker | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("instances", "threads", "preparation_threads", "capacity", "max_replacements"):
            least = 0 if name == "max_replacements" else 1
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name} is {value!r}; give a whole number of at least {least}")
        for name in ("hang_after", "open_timeout"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                raise UserError(f"{name} is {value!r}; give seconds above 0")
        drain: object = self.drain_timeout  # whatever a caller without types may give
        if drain is not None and (not is_number(drain) or not 0 <= drain < math.inf):
            raise UserError(f"drain_timeout is {drain!r}; give seconds, 0 or more, or None for no limit")
        lengths: object = self.length_buckets
        if lengths is not None and (
            not isinstance(lengths, (tuple, list)) or not all(isinstance(one, int) for one in lengths)
        ):
            raise UserError(
                f"length_buckets is {lengths!r}; give whole numbers in a tuple, such as (8, 16, 32)"
            )
        if not isinstance(self.warm_up, bool):
            raise UserError(f"warm_up is {self.warm_up!r}; give True or False")
        if self.engine is not None and not callable(self.engine):
            raise UserError(
                f"engine is {self.engine!r}; give a function that makes an engine of (ONNX file, threads)"
            )
        if self.when_full not in ("wait", "shed"):
            raise unknown_name("behaviour when full", self.when_full, ("wait", "shed"))
        policies = {} if isinstance(self.batching, BatchPolicy) else self.batching
        if not isinstance(policies, Mapping):
            raise UserError(f"batching is a {type(policies).__name__}; give a BatchPolicy, or one a tower")
        for tower, policy in policies.items():
            if not isinstance(policy, BatchPolicy):
                raise UserError(f"batching of {tower!r} is a {type(policy).__name__}; give a BatchPolicy")

    def policy(self, tower: str) -> BatchPolicy:
        """Return the batch policy of a tower. No batch is larger than what the runner holds.

        A full runner would else wait for company that it lets nobody be.
        """
        given = self.batching
        policy = given if isinstance(given, BatchPolicy) else given.get(tower, BatchPolicy())
        if policy.max_batch_size <= self.capacity:
            return policy
        fitting = tuple(size for size in policy.preferred_batch_sizes if size <= self.capacity)
        return replace(policy, max_batch_size=self.capacity, preferred_batch_sizes=fitting)

    def check_towers(self, towers: Iterable[str]) -> None:
        """Raise UserError for a batch policy of a tower that is not served."""
        if not isinstance(self.batching, BatchPolicy):
            known = sorted(towers)
            for tower in self.batching:
                if tower not in known:
                    raise unknown_name("tower in batching", tower, known)

    def warm_up_batches(self, sources: Mapping[str, TowerSource]) -> dict[str, Sequence[int]]:
        """Return the batch sizes that each tower is warmed up with."""
        if not self.warm_up:
            return dict.fromkeys(sources, ())
        return {name: sorted({1, self.policy(name).max_batch_size}) for name in sources}


def is_number(value: object) -> TypeGuard[int | float]:
    """Say whether a value is a number and was meant as one: to Python True is 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
