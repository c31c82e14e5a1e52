"""GPU memory and one stream through the CUDA driver's C interface: every such call is in this file.

Source: the CUDA Driver API reference (cuda.h); the ``_v2`` names are the 64-bit ones. Only ctypes
and the driver are needed, which every machine with a working GPU has. Not for production rates: the
asynchronous runner owns that; this serves self-tests and timing of engines.
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import EdgeglmError, UserError

Array = npt.NDArray[Any]


class CudaMemory:
    """The primary context of GPU 0 with one stream, and device buffers by name that only grow.

    Use it as a context manager. Raises UserError where there is no driver, EdgeglmError when a call
    fails.
    """

    def __init__(self) -> None:
        try:
            self._driver: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise UserError("there is no CUDA driver here; use ONNX Runtime on the CPU") from error
        self._context = ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self._buffers: dict[str, tuple[ctypes.c_uint64, int]] = {}
        self._on_the_way: list[Array] = []
        self._device = ctypes.c_int()

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.value or 0)

    def __enter__(self) -> CudaMemory:
        """Take the device's primary context and make the stream."""
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        try:
            self.bind()
            self._call("cuStreamCreate", ctypes.byref(self._stream), 1)  # CU_STREAM_NON_BLOCKING
        except EdgeglmError:
            self._driver.cuDevicePrimaryCtxRelease_v2(self._device)
            raise
        return self

    def bind(self) -> None:
        """Make the context this thread's own: the driver keeps that by thread, and fails without (201)."""
        self._call("cuCtxSetCurrent", self._context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give everything back, from whatever thread."""
        self._driver.cuCtxSetCurrent(self._context)
        self._driver.cuStreamSynchronize(self._stream)
        self._on_the_way.clear()
        for pointer, _ in self._buffers.values():
            self._driver.cuMemFree_v2(pointer)
        self._buffers.clear()
        self._driver.cuStreamDestroy_v2(self._stream)
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)

    def buffer(self, name: str, size: int) -> int:
        """Return the address of a device buffer of at least ``size`` bytes."""
        pointer, room = self._buffers.get(name, (ctypes.c_uint64(), 0))
        if room < size:
            if room:
                del self._buffers[name]  # if the next call finds no memory, this one is gone all the same
                self._call("cuMemFree_v2", pointer)
            pointer = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
            self._buffers[name] = (pointer, size)
        return int(pointer.value)

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to the device, in the order of the stream; return the address.

        On the stream, because it is a non-blocking one: the plain copy may return while the data of
        pageable memory is still on its way, and nothing would make the engine wait for it (CUDA Driver
        API, "API synchronization behavior").
        """
        whole = np.ascontiguousarray(array)
        address = self.buffer(name, max(1, whole.nbytes))
        source = whole.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(whole.nbytes)
        self._on_the_way.append(whole)  # until the stream is synchronized nobody may free it
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, self._stream)
        return address

    def download(self, name: str, into: Array) -> None:
        """Copy a device buffer into a contiguous array; synchronize first."""
        pointer, _ = self._buffers[name]
        target = into.ctypes.data_as(ctypes.c_void_p)
        self._call("cuMemcpyDtoH_v2", target, pointer, ctypes.c_size_t(into.nbytes))

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self._stream)
        self._on_the_way.clear()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise EdgeglmError(
                f"the CUDA driver's {name} failed with {status}; "
                "end other programs on the GPU, or restart the machine"
            )
