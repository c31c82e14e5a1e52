"""The CUDA driver's C interface through ctypes: no toolkit and no compiler, only the driver itself.

Source: the CUDA Driver API reference (cuda.h); the ``_v2`` names are the 64-bit ones, and none of these
changed between CUDA 11.4 (JetPack 5) and 13. Argument types are declared, since ctypes would pass a plain
int as 32 bits and cut an address off.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_int, c_size_t, c_uint, c_uint64, c_void_p
from types import TracebackType
from typing import Any

import numpy as np

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.engines.cuda_driver import Buffer, CaptureError

LIBRARY = "libcuda.so.1"
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
DEVICE_MAP = 2  # CU_MEMHOSTALLOC_DEVICEMAP
_INTEGRATED, _CAN_MAP_HOST = 18, 19  # CU_DEVICE_ATTRIBUTE_*
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
}


class Libcuda:
    """The functions of ``libcuda`` that edgeglm calls, by name. Raises UserError where it is absent."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise UserError("there is no CUDA driver here; use ONNX Runtime on the CPU") from error
        self._functions = {}
        for name, types in _ARGUMENTS.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise UserError(
                    f"this CUDA driver has no {name}, so it is older than CUDA 11.4; update it"
                ) from error
            function.argtypes = types
            self._functions[name] = function

    def status(self, name: str, *arguments: Any) -> int:
        """Call a function and return its CUresult."""
        return int(self._functions[name](*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises EdgeglmError unless it succeeds."""
        status = self.status(name, *arguments)
        if status != 0:
            raise EdgeglmError(
                f"the CUDA driver's {name} failed with {status}; "
                "end other programs on the GPU, or restart the machine"
            )


class Graphs:
    """Captures and graphs of one stream. pycuda has none of them, so they are the same on both ways."""

    def __init__(self, library: Libcuda, stream: int) -> None:
        self._library, self._stream = library, stream

    def captured(self, work: Callable[[], bool]) -> int:
        """As ``Driver.captured``."""
        library, graph, executable = self._library, c_void_p(), c_void_p()
        library.call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            done = work()
        finally:
            status = library.status("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            if status == 0 and done:
                reference = ctypes.byref(executable)
                status = library.status("cuGraphInstantiateWithFlags", reference, graph, 0)
        finally:
            if graph.value:
                library.call("cuGraphDestroy", graph)
        if not done or status != 0:
            why = f"CUDA error {status}" if status else "the library refused"
            raise CaptureError(f"the calls cannot be captured as a graph ({why}); run them one by one")
        return int(executable.value or 0)

    def launch(self, graph: int) -> None:
        """As ``Driver.launch``."""
        self._library.call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: int) -> None:
        """As ``Driver.drop``."""
        self._library.call("cuGraphExecDestroy", graph)


class CtypesDriver:
    """A ``Driver`` by ctypes."""

    name = "ctypes"

    def __init__(self) -> None:
        self._library = Libcuda()
        self._device = c_int()
        self._context, self._stream = c_void_p(), c_void_p()
        self._host: list[c_void_p] = []
        self._memory: list[int] = []
        self._zero_copy = False
        self._graphs: Graphs | None = None

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream.value or 0)

    @property
    def zero_copy(self) -> bool:
        """Whether host and GPU share their memory."""
        return self._zero_copy

    def __enter__(self) -> CtypesDriver:
        """Take the primary context and make the stream."""
        call = self._library.call
        call("cuInit", 0)
        call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._zero_copy = bool(self._attribute(_INTEGRATED) and self._attribute(_CAN_MAP_HOST))
        call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        try:
            with self.bound():
                call("cuStreamCreate", ctypes.byref(self._stream), NON_BLOCKING)
        except EdgeglmError:
            self._library.status("cuDevicePrimaryCtxRelease_v2", self._device)
            raise
        self._graphs = Graphs(self._library, self.stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back. After a fault of the GPU every call fails, and none must stop the others."""
        status = self._library.status
        with self.bound():
            status("cuStreamSynchronize", self._stream)
            for address in self._memory:
                status("cuMemFree_v2", address)
            for pointer in self._host:
                status("cuMemFreeHost", pointer)
            status("cuStreamDestroy_v2", self._stream)
        self._memory.clear()
        self._host.clear()
        status("cuDevicePrimaryCtxRelease_v2", self._device)

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Make the context the calling thread's own for a while: the driver keeps that by thread."""
        self._library.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._library.status("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def buffer(self, size: int) -> Buffer:
        """Take a buffer; on a GPU that shares the host's memory, one that both see."""
        pointer, address = c_void_p(), c_uint64()
        flags = DEVICE_MAP if self._zero_copy else 0
        self._library.call("cuMemHostAlloc", ctypes.byref(pointer), size, flags)
        self._host.append(pointer)
        host = np.ctypeslib.as_array(ctypes.cast(pointer, POINTER(ctypes.c_uint8)), shape=(size,))
        if not self._zero_copy:
            return Buffer(host, self.scratch(size))
        self._library.call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), pointer, 0)
        return Buffer(host, address.value)

    def scratch(self, size: int) -> int:
        """Take memory of the GPU's own."""
        address = c_uint64()
        self._library.call("cuMemAlloc_v2", ctypes.byref(address), size)
        self._memory.append(address.value)
        return address.value

    def upload(self, buffer: Buffer, size: int) -> None:
        """Have bytes copied to the GPU."""
        if not self._zero_copy:
            source = buffer.host.ctypes.data
            self._library.call("cuMemcpyHtoDAsync_v2", buffer.device, source, size, self._stream)

    def download(self, buffer: Buffer, size: int) -> None:
        """Have bytes copied to the host."""
        if not self._zero_copy:
            target = buffer.host.ctypes.data
            self._library.call("cuMemcpyDtoHAsync_v2", target, buffer.device, size, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._library.call("cuStreamSynchronize", self._stream)

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

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        self._library.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return value.value
