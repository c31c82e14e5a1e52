"""What a discrete GPU tells of itself, asked of NVIDIA's management library through ctypes alone.

Source: NVML API reference (nvml.h). Jetsons have the files of ``board`` instead; their NVML, where there is
one, answers "not supported" to most of this, which then is absent here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import cache
from typing import Any

LIBRARY = "libnvidia-ml.so.1"

_GPU_CORE = 0  # NVML_TEMPERATURE_GPU
_CLOCKS = {"gpu": 1, "gpu memory": 2}  # NVML_CLOCK_SM, NVML_CLOCK_MEM
_THROTTLES = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""nvmlClocksThrottleReason*; 0x1, an idle GPU, and 0x100, a display's clock, hold nothing back."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """The state of one GPU; what it does not tell is None or absent.

    Attributes:
        temperature_c: Of the chip, in degrees Celsius.
        clocks_mhz: Of the multiprocessors (``gpu``) and of the memory.
        power_mw: Of the board, in milliwatts.
        throttled: What holds its clocks back now.
        memory_free_bytes: What no process has taken.
    """

    temperature_c: float | None = None
    clocks_mhz: dict[str, float] = field(default_factory=dict)
    power_mw: float | None = None
    throttled: tuple[str, ...] = ()
    memory_free_bytes: int | None = None


def gpu_reading(bus_id: str | None, *, library: str = LIBRARY) -> GpuReading | None:
    """Read one GPU now; None where there is no management library or it does not know the GPU.

    Args:
        bus_id: The PCI address that CUDA gives it, since the two libraries number GPUs differently.
        library: The shared object; a test brings its own.
    """
    nvml = _started(library)
    if nvml is None or bus_id is None:
        return None
    device = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(device)) != 0:
        return None
    clocks = {}
    for name, kind in _CLOCKS.items():
        if (value := _number(nvml, "nvmlDeviceGetClockInfo", device, ctypes.c_int(kind))) is not None:
            clocks[name] = float(value)
    reasons = _number(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", device, kind=ctypes.c_ulonglong)
    memory = _Memory()
    known = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0
    return GpuReading(
        temperature_c=_number(nvml, "nvmlDeviceGetTemperature", device, ctypes.c_int(_GPU_CORE)),
        clocks_mhz=clocks,
        power_mw=_number(nvml, "nvmlDeviceGetPowerUsage", device),
        throttled=tuple(words for bit, words in _THROTTLES.items() if (reasons or 0) & bit),
        memory_free_bytes=memory.free if known else None,
    )


def driver_version(*, library: str = LIBRARY) -> str | None:
    """Return the version of the GPU's driver; None where there is no management library."""
    nvml, said = _started(library), ctypes.create_string_buffer(80)
    if nvml is None or nvml.nvmlSystemGetDriverVersion(said, len(said)) != 0:
        return None
    return said.value.decode(errors="replace")


@cache
def _started(library: str) -> Any:
    """Return the library, started once for the process; None where it is absent or finds no driver."""
    try:
        nvml = ctypes.CDLL(library)
        return nvml if nvml.nvmlInit_v2() == 0 else None
    except (AttributeError, OSError):
        return None


def _number(nvml: Any, name: str, *arguments: Any, kind: Any = ctypes.c_uint) -> int | None:
    value = kind()
    try:
        status = getattr(nvml, name)(*arguments, ctypes.byref(value))
    except AttributeError:  # a library older or newer than this call
        return None
    return value.value if status == 0 else None
