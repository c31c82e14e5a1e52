"""What a TensorRT engine asks of the CUDA driver, and which of two ways it takes there.

``cuda_pycuda`` goes through pycuda, ``cuda_ctypes`` through ctypes alone. Every CUDA call of the engine is in
these two. Both work in the primary context, which the CUDA runtime inside TensorRT uses as well, so that
pycuda, torch and TensorRT see each other's memory; nobody calls cuCtxCreate, whose arguments changed with
CUDA 13.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import EdgeglmError, UserError, unknown_name

Way = Literal["pycuda", "ctypes"]
WAYS: tuple[Way, ...] = ("pycuda", "ctypes")
CHOICE_VARIABLE = "EDGEGLM_CUDA"
"""Environment variable that names one of ``WAYS``, for whoever must rule one out."""


@dataclass(frozen=True)
class Buffer:
    """Page-locked host memory, uint8 [size], and the address at which the GPU sees its content.

    Where host and GPU share their memory both are the same bytes; elsewhere the address is memory of the
    GPU's own, filled by ``upload`` and read by ``download``.
    """

    host: npt.NDArray[np.uint8]
    device: int


class CaptureError(EdgeglmError):
    """A stream could not be captured, so there is no graph. What was to be captured can be run instead."""


class Driver(Protocol):
    """One stream of GPU 0, and memory that lives until the driver is closed.

    Use it as a context manager. All other methods want to be called within ``bound``. They raise
    EdgeglmError when the driver fails; ``__enter__`` raises UserError where there is none.
    """

    name: str
    """The way it goes, with its version."""

    @property
    def stream(self) -> int:
        """The handle of the stream, which waits for no other one, the default stream included."""

    @property
    def zero_copy(self) -> bool:
        """Whether host and GPU share their memory, as on a Jetson, so that nothing is copied."""

    def __enter__(self) -> Driver:
        """Take the primary context and make the stream."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back, from whatever thread."""

    def bound(self) -> AbstractContextManager[None]:
        """Make the context the calling thread's own, and what was its own before, afterwards."""

    def buffer(self, size: int) -> Buffer:
        """Take a buffer of ``size`` bytes, at least 1."""

    def scratch(self, size: int) -> int:
        """Take ``size`` bytes of the GPU's memory, at least 1; return the address."""

    def upload(self, buffer: Buffer, size: int) -> None:
        """Have the first ``size`` bytes copied to the GPU, in the order of the stream; none if shared."""

    def download(self, buffer: Buffer, size: int) -> None:
        """Have the first ``size`` bytes copied to the host, in the order of the stream; none if shared."""

    def synchronize(self) -> None:
        """Wait for the stream; other Python threads run meanwhile."""

    def captured(self, work: Callable[[], bool]) -> int:
        """Capture what ``work`` puts into the stream as a graph; nothing of it is executed.

        Raises CaptureError when ``work`` returns False or did what no capture allows.
        """

    def launch(self, graph: int) -> None:
        """Put a captured graph into the stream."""

    def drop(self, graph: int) -> None:
        """Give a captured graph back."""


def this_driver() -> Driver:
    """Return the driver by pycuda where it is installed, else by ctypes; neither is opened yet.

    Raises UserError when ``EDGEGLM_CUDA`` names something else, or pycuda where it is absent.
    """
    asked = os.environ.get(CHOICE_VARIABLE)
    if asked is not None and asked not in WAYS:
        raise unknown_name(f"way to CUDA in {CHOICE_VARIABLE}", asked, WAYS)
    there = _is_there("pycuda")
    if asked == "pycuda" and not there:
        raise UserError(
            f"{CHOICE_VARIABLE} asks for pycuda, which is not installed; run scripts/jetson-pycuda"
        )
    if there and asked != "ctypes":
        from edgeglm.engines.cuda_pycuda import PycudaDriver

        return PycudaDriver()
    from edgeglm.engines.cuda_ctypes import CtypesDriver

    return CtypesDriver()


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported already, by something that is no module with a spec
        return True
