"""From what a user names to towers that a runner can serve; in a thread, for it reads a lot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.errors import UserError
from edgeglm.engines.protocol import Engine
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.contract import TowerSource
from edgeglm.runtime.finalized import choice_here
from edgeglm.runtime.requests import no_thread
from edgeglm.runtime.towers import sources_from_bundle

Source = Path | Bundle | Mapping[str, TowerSource]


@dataclass(frozen=True, kw_only=True)
class OpenedSource:
    """Towers, what they run through in words, the variant they are of, and how to give them back."""

    towers: Mapping[str, TowerSource]
    close: Callable[[], None]
    words: str = ""
    variant: str = ""


async def opened_source(source: Source, config: RunnerConfig) -> OpenedSource:
    """Open a source without holding up the event loop; if cancelled, what was opened is closed.

    Raises UserError for a bundle that is damaged, unknown or incomplete, EngineFailedError where there is no
    thread to open it in.
    """
    if not isinstance(source, (Path, Bundle, Mapping)):
        raise UserError(
            f"the source {source!r} is a {type(source).__name__}; give the pathlib.Path of a bundle, "
            "an opened bundle, or {name: TowerSource}"
        )
    if isinstance(source, Mapping):
        if not source:
            raise UserError("the source has no towers; give at least one, as {name: TowerSource}")
        for name, tower in source.items():
            given: object = name  # whatever a caller without types may give
            if not isinstance(given, str):
                raise UserError(f"the name of a tower is a {type(given).__name__}; give a str")
            if not isinstance(tower, TowerSource):
                raise UserError(f"tower {name!r} is a {type(tower).__name__}; give a TowerSource")
        return OpenedSource(towers=source, close=_nothing)
    wanted = True

    def work() -> OpenedSource:
        if not wanted:  # a queue keeps what it got no thread for, and hands it to the next one
            raise asyncio.CancelledError
        return _opened(source, config)

    try:
        opening = asyncio.get_running_loop().run_in_executor(None, work)
    except RuntimeError as error:
        wanted = False
        raise no_thread("opening the bundle", error) from error
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


def _opened(source: Path | Bundle, config: RunnerConfig) -> OpenedSource:
    bundle = open_bundle(source) if isinstance(source, Path) else source
    close = bundle.close if isinstance(source, Path) else _nothing
    try:
        variant, engine, words = config.variant, config.engine, "the engine that was asked for"
        if engine is None:
            choice = choice_here(bundle, config.variant)
            variant, words = choice.variant, choice.words
            made = choice.engine

            def engine(path: Path, threads: int) -> Engine:
                return cast("Engine", made(path, threads))

        towers = sources_from_bundle(
            bundle,
            variant=variant,
            threads=config.threads,
            engine=engine,
            length_buckets=config.length_buckets,
        )
        return OpenedSource(towers=towers, close=close, words=words, variant=bundle.variant(variant).name)
    except BaseException:
        close()
        raise


def _close(opening: asyncio.Future[OpenedSource]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _nothing() -> None:
    """Close nothing: what was opened is the caller's."""
