"""Many SVG documents to pixels, in a pool of processes (the renderer holds the interpreter lock)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import numpy.typing as npt

from edgeglm.core.progress import Progress
from edgeglm.data.iconsets import rgb_from_svg

_BATCH = 32


def rendered(
    documents: Sequence[str], size: int, *, threads: int, progress: Progress
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the pixels of each document in order: uint8 [size, size, 3], RGB on white.

    Uses ``threads`` processes; the pixels do not depend on how many. Few documents are rendered here.
    Raises ValueError if a document is not SVG.
    """
    batches = [documents[i : i + _BATCH] for i in range(0, len(documents), _BATCH)]
    with progress.task("render icons", len(documents)) as task:
        if threads < 2 or len(batches) < 4:
            for batch in batches:
                yield from _render_batch(batch, size)
                task.advance(len(batch))
            return
        # Spawned, since a fork would copy locks that other threads hold (torch, progress bars).
        pool = ProcessPoolExecutor(
            threads, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )
        try:
            for pixels in pool.map(_render_batch, batches, [size] * len(batches)):
                yield from pixels
                task.advance(len(pixels))
        finally:
            pool.shutdown(cancel_futures=True)


def _render_batch(documents: Sequence[str], size: int) -> npt.NDArray[np.uint8]:
    return np.stack([rgb_from_svg(document, size) for document in documents])


def _end_with_parent() -> None:
    """Leave an interrupt to the parent, and end when it does, also by ``kill -9``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
