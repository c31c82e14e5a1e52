"""A bundle beside an index, ready to embed for it: what the commands share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeglm.bundle.opened import Bundle
from edgeglm.core.errors import UserError
from edgeglm.core.progress import Progress
from edgeglm.index.pictures import PictureCounts, index_pictures
from edgeglm.index.space import header_for, require_index_space
from edgeglm.index.vector_index import create_index, header_of
from edgeglm.index.writer import IndexWriter
from edgeglm.runtime.config import RunnerConfig
from edgeglm.runtime.finalized import choice_here
from edgeglm.runtime.runner import Runner


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Which pictures to take, and how; see ``index_pictures``."""

    folder: Path
    prefix: str | None = None
    metadata: Mapping[str, Mapping[str, Any]] | None = None
    skip_bad: bool = False
    prune: bool = False
    allow_empty: bool = False
    threads: int = 2


def built_index(
    bundle: Bundle,
    source: FolderSource,
    output: Path,
    progress: Progress,
    *,
    variant: str | None = None,
    precision: str = "int8",
    thumbnail_side: int = 192,
) -> PictureCounts:
    """Make an index of a folder. Raises UserError; an index without a row is not left behind.

    If it is interrupted what was written stays, and ``added_to_index`` goes on.
    """
    import shutil

    if not source.folder.exists():
        raise UserError(f"there is no folder at {source.folder}; give a folder of pictures")
    choice = choice_here(bundle, variant)
    header = header_for(bundle, choice.variant, precision=precision, thumbnail_side=thumbnail_side)
    create_index(output, header)
    try:
        counts = added_to_index(bundle, source, output, progress, variant=variant)
        with IndexWriter(output) as writer:
            writer.fold()
        return counts
    except UserError:
        with IndexWriter(output) as writer:
            empty = not writer.contents.entries
        if empty:
            shutil.rmtree(output, ignore_errors=True)
        raise


def added_to_index(
    bundle: Bundle, source: FolderSource, index: Path, progress: Progress, *, variant: str | None = None
) -> PictureCounts:
    """Bring an index up to date with a folder. Raises UserError, for another embedding space too."""
    choice = choice_here(bundle, variant)
    require_index_space(header_of(index), bundle, choice.variant, index)
    config = RunnerConfig(variant=variant, threads=source.threads, preparation_threads=1)

    async def run() -> PictureCounts:
        with IndexWriter(index) as writer:
            async with Runner(bundle, config) as runner:
                return await index_pictures(
                    writer,
                    runner,
                    bundle.preprocessing.image,
                    source.folder,
                    progress,
                    prefix=source.prefix,
                    metadata=source.metadata,
                    skip_bad=source.skip_bad,
                    prune=source.prune,
                    allow_empty=source.allow_empty,
                    threads=source.threads,
                )

    return asyncio.run(run())
