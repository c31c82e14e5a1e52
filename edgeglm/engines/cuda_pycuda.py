"""The CUDA driver through pycuda: contexts, streams, page-locked memory and copies are pycuda's.

Graphs are not: pycuda 2026.1 has no stream capture, so those calls go to ``libcuda`` by ctypes, on pycuda's
stream. The primary context is retained once for the process, as ``pycuda.autoprimaryctx`` does, and kept.
pycuda frees a thing only where its context is the calling thread's, hence ``bound`` around all of it.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.cuda_ctypes import DEVICE_MAP, NON_BLOCKING, Graphs, Libcuda
from edgeglm.engines.cuda_driver import Buffer


class PycudaDriver:
    """A ``Driver`` by pycuda."""

    def __init__(self) -> None:
        try:
            import pycuda
            import pycuda.driver
        except ImportError as error:
            raise UserError(
                f"pycuda does not start here ({error}); mend the CUDA driver, build pycuda anew, "
                "or set EDGEGLM_CUDA=ctypes"
            ) from error
        self.name = f"pycuda {pycuda.VERSION_TEXT}"
        self._cuda: Any = pycuda.driver
        self._context: Any = None
        self._stream: Any = None
        self._held: list[Any] = []
        self._zero_copy = False
        self._graphs: Graphs | None = None

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream.handle) if self._stream is not None else 0

    @property
    def zero_copy(self) -> bool:
        """Whether host and GPU share their memory."""
        return self._zero_copy

    def __enter__(self) -> PycudaDriver:
        """Take the primary context and make the stream."""
        with self._told():
            device, self._context = _primary(self._cuda)
        with self.bound():
            known = self._cuda.device_attribute
            shared = (known.INTEGRATED, known.CAN_MAP_HOST_MEMORY)
            self._zero_copy = all(device.get_attribute(attribute) for attribute in shared)
            self._stream = self._cuda.Stream(NON_BLOCKING)
        self._graphs = Graphs(Libcuda(), self.stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the memory and the stream back."""
        with self.bound():
            with contextlib.suppress(self._cuda.Error):  # after a fault of the GPU every call fails
                self._stream.synchronize()
            for thing in self._held:
                thing.free()
            self._held.clear()
            self._stream = None

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Make the context the calling thread's own for a while."""
        with self._told():
            self._context.push()
            try:
                yield
            finally:
                self._cuda.Context.pop()

    def buffer(self, size: int) -> Buffer:
        """Take a buffer; on a GPU that shares the host's memory, one that both see."""
        flags = DEVICE_MAP if self._zero_copy else 0
        with self._told():
            host = self._cuda.pagelocked_empty(size, np.uint8, mem_flags=flags)
            self._held.append(host.base)
            if self._zero_copy:
                return Buffer(host, int(host.base.get_device_pointer()))
        return Buffer(host, self.scratch(size))

    def scratch(self, size: int) -> int:
        """Take memory of the GPU's own."""
        with self._told():
            memory = self._cuda.mem_alloc(size)
        self._held.append(memory)
        return int(memory)

    def upload(self, buffer: Buffer, size: int) -> None:
        """Have bytes copied to the GPU."""
        if not self._zero_copy:
            with self._told():
                self._cuda.memcpy_htod_async(buffer.device, buffer.host[:size], self._stream)

    def download(self, buffer: Buffer, size: int) -> None:
        """Have bytes copied to the host."""
        if not self._zero_copy:
            with self._told():
                self._cuda.memcpy_dtoh_async(buffer.host[:size], buffer.device, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        with self._told():
            self._stream.synchronize()

    def captured(self, work: Callable[[], bool]) -> int:
        """Capture what ``work`` puts into the stream."""
        return self._opened_graphs().captured(work)

    def launch(self, graph: int) -> None:
        """Put a graph into the stream."""
        self._opened_graphs().launch(graph)

    def drop(self, graph: int) -> None:
        """Give a graph back."""
        self._opened_graphs().drop(graph)

    def _opened_graphs(self) -> Graphs:
        assert self._graphs is not None, "the driver is open"
        return self._graphs

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._cuda.Error as error:
            raise EdgeglmError(
                f"pycuda: {error}; end other programs on the GPU, or restart the machine"
            ) from error


@cache
def _primary(cuda: Any) -> tuple[Any, Any]:
    """Return GPU 0 and its primary context, retained once: pycuda can let go of it in one thread only."""
    cuda.init()
    device = cuda.Device(0)
    context = device.retain_primary_context()
    atexit.register(context.detach)  # its destructor would take it for a context that it had made
    return device, context
