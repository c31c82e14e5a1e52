"""The GPU is a stand-in, a library compiled here with NVML's functions; that ctypes calls it is real."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeglm.engines import board as module
from edgeglm.engines.board import conditions, this_board
from edgeglm.engines.cuda_devices import CudaDevice
from edgeglm.engines.nvml import GpuReading, driver_version, gpu_reading
from edgeglm.engines.power import PowerWatch

SOURCE = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit_v2(void) { return STARTS; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
  *device = (void *)7;
  return strcmp(bus, "0000:65:00.0") != 0;
}
int nvmlSystemGetDriverVersion(char *said, unsigned length) { strncpy(said, "580.95.05", length); return 0; }
static int own(void *device) { return device != (void *)7; }
int nvmlDeviceGetClockInfo(void *d, int kind, unsigned *value) {
  *value = kind == 1 ? 1410 : 1593; return own(d) || (kind != 1 && kind != 2);
}
int nvmlDeviceGetTemperature(void *d, int sensor, unsigned *value) { *value = 61; return own(d) || sensor; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *value) { *value = 251000; return own(d) || NO_POWER; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, unsigned long long *value) {
  *value = 0x1 | 0x4 | 0x20; return own(d);
}
int nvmlDeviceGetMemoryInfo(void *d, memory *m) {
  m->total = 80ull << 30; m->free = 9ull << 30; m->used = 71ull << 30; return own(d);
}
"""
BUS = "0000:65:00.0"


@pytest.fixture
def library(tmp_path: Path, require_system: Callable[[str], str]) -> Callable[..., str]:
    def compiled(*, starts: int = 0, no_power: int = 0) -> str:
        place = tmp_path / f"libnvidia-ml-{starts}{no_power}.so"
        given = [f"-DSTARTS={starts}", f"-DNO_POWER={no_power}"]
        subprocess.run(
            [require_system("cc"), "-shared", "-fPIC", *given, "-x", "c", "-", "-o", str(place)],
            input=SOURCE.encode(),
            check=True,
        )
        return str(place)

    return compiled


def test_a_build_can_say_which_driver_its_engines_were_made_under(library: Callable[..., str]) -> None:
    assert driver_version(library=library()) == "580.95.05"
    assert driver_version(library=library(starts=1)) is None
    assert driver_version(library="libno-such-thing.so") is None


def test_a_discrete_gpu_tells_heat_clocks_power_and_what_holds_it_back(library: Callable[..., str]):
    reading = gpu_reading(BUS, library=library())
    assert reading == GpuReading(
        temperature_c=61,
        clocks_mhz={"gpu": 1410.0, "gpu memory": 1593.0},
        power_mw=251000,
        throttled=("power cap", "thermal slowdown"),
        memory_free_bytes=9 << 30,
    )
    assert gpu_reading("0000:01:00.0", library=library()) is None, "another GPU than CUDA's"
    assert gpu_reading(None, library=library()) is None


def test_what_a_gpu_does_not_tell_is_absent_and_not_zero(library: Callable[..., str], tmp_path: Path):
    reading = gpu_reading(BUS, library=library(no_power=1))
    assert reading is not None
    assert (reading.power_mw, reading.temperature_c) == (None, 61)
    assert gpu_reading(BUS, library=library(starts=9)) is None, "no driver"
    assert gpu_reading(BUS, library=str(tmp_path / "none.so")) is None
    bare = tmp_path / "bare.so"
    subprocess.run(["cc", "-shared", "-x", "c", "-", "-o", str(bare)], input=b"int x;", check=True)
    assert gpu_reading(BUS, library=str(bare)) is None, "a library without these functions"


def test_the_receipt_of_a_gpu_host_says_what_the_gpu_was_like(
    library: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    a100 = CudaDevice(name="A100", sm=80, memory_bytes=80 << 30, bus_id=BUS)
    place = library()
    monkeypatch.setattr(module, "cuda_devices", lambda: (a100,))
    monkeypatch.setattr(module, "gpu_reading", lambda bus: gpu_reading(bus, library=place))
    here = conditions()
    assert (here.temperatures_c["gpu"], here.clocks_mhz["gpu"]) == (61.0, 1410.0)
    assert here.rails_mw["GPU"] == 251000.0
    assert here.throttled[-2:] == ("power cap", "thermal slowdown")
    board = this_board()
    assert (board.gpu_memory_bytes, board.gpu_memory_free_bytes) == (80 << 30, 9 << 30)
    watch = PowerWatch(every=0.01)
    with watch.watching():
        pass
    assert watch.energy is not None
    assert watch.energy.joules["GPU"] == pytest.approx(251.0 * watch.energy.seconds, rel=0.2, abs=0.3)
