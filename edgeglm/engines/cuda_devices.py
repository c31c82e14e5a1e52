"""Which GPUs the driver shows, asked through ``libcuda`` alone: no toolkit, no pycuda."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_* (CUDA driver API, cuda.h)


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """One GPU: its name, compute capability without the dot, memory in bytes, and PCI address."""

    name: str
    sm: int
    memory_bytes: int
    bus_id: str | None = None


@cache
def cuda_devices() -> tuple[CudaDevice, ...]:
    """Return the GPUs that the CUDA driver shows; none where there is no driver or it does not start."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_device(driver, ordinal) for ordinal in range(count.value))


def _device(driver: ctypes.CDLL, ordinal: int) -> CudaDevice:
    name = ctypes.create_string_buffer(128)
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory = ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(handle), ordinal)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    text = name.value.decode(errors="replace")
    address = ctypes.create_string_buffer(32)
    known = driver.cuDeviceGetPCIBusId(address, len(address), handle) == 0
    return CudaDevice(
        name=text,
        sm=major.value * 10 + minor.value,
        memory_bytes=memory.value,
        bus_id=address.value.decode(errors="replace") if known else None,
    )
