"""Which board this is, read from its files: nothing is asked of a tool that may be absent.

Sources: ``/proc/device-tree`` and ``/etc/nv_tegra_release`` as NVIDIA's L4T writes them,
``/etc/nvpmodel.conf`` and ``/var/lib/nvpmodel/status`` for the power mode (its numbers differ by
board and release, so the name is looked up), ``/proc/meminfo`` and the control group for memory,
``/var/lib/dpkg/status`` for a TensorRT that has no Python binding.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.libraries import MODULES, installed_version
from edgeglm.engines.nvml import GpuReading, gpu_reading

_TEGRA_SMS = {"tegra194": 72, "tegra234": 87, "tegra264": 110}
_TEGRA_GPUS = {"tegra194": "Volta (Xavier)", "tegra234": "Ampere (Orin)", "tegra264": "Blackwell (Thor)"}
_GPU_CLOCK = re.compile(r"gpu|\.gv11b$|\.ga10b$")
"""The folder of the GPU's clock: JetPack 5 names it for the chip, ``17000000.ga10b``, later ones ``gpu``."""
_TRTEXEC = "usr/src/tensorrt/bin/trtexec"


class Board(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine.

    Attributes:
        model: The device tree's model, or the CPU's name.
        machine: ``aarch64`` or ``x86_64``.
        soc: NVIDIA's name of the chip, such as ``tegra234``; None where there is no device tree.
        l4t: Release of Linux for Tegra, such as ``36.4.3``.
        sm: Compute capability of the first GPU without the dot; None where no GPU is seen.
        gpu: Its name.
        memory_bytes: All memory; on a Jetson the GPU shares it.
        memory_available_bytes: What may still be taken, by the kernel's and the control group's word.
        gpu_memory_bytes: Memory of a GPU that has its own; 0 for none.
        gpu_memory_free_bytes: What of it no process has taken; None where nobody tells.
        power_mode: The name that nvpmodel gives the present mode.
        libraries: ``{library: version}`` of those that Python can import.
        trtexec: Where ``trtexec`` lies, if it does.
        trtexec_version: The TensorRT that the package manager installed.
    """

    model: str
    machine: str
    soc: str | None = None
    l4t: str | None = None
    sm: int | None = None
    gpu: str | None = None
    memory_bytes: int = 0
    memory_available_bytes: int = 0
    gpu_memory_bytes: int = 0
    gpu_memory_free_bytes: int | None = None
    power_mode: str | None = None
    libraries: dict[str, str] = {}
    trtexec: str | None = None
    trtexec_version: str | None = None

    @property
    def identity(self) -> dict[str, str | int | None]:
        """What makes it this kind of board: a receipt of another identity is a foreign one."""
        return {"model": self.model, "machine": self.machine, "sm": self.sm, "gpu": self.gpu}

    @property
    def words(self) -> str:
        """Name the board in a few words."""
        parts = [self.model, self.machine]
        if self.sm is not None:
            parts.append(f"SM {self.sm // 10}.{self.sm % 10}")
        if self.l4t:
            parts.append(f"L4T {self.l4t}")
        return ", ".join(parts)


class Conditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under what conditions something was measured. What the board does not tell is absent.

    Attributes:
        temperatures_c: ``{thermal zone: degrees Celsius}``.
        clocks_mhz: Present clock of the first CPU core and of the GPU.
        rails_mw: Power of each rail that an INA sensor watches, and of a discrete GPU, in milliwatts.
        throttled: What holds something back now: cooling devices, and the reasons that a GPU gives.
    """

    temperatures_c: dict[str, float] = {}
    clocks_mhz: dict[str, float] = {}
    rails_mw: dict[str, float] = {}
    throttled: tuple[str, ...] = ()


def this_board() -> Board:
    """Return the machine that this runs on: its files, its driver, and what Python can import."""
    board = board_from_files(Path("/"), libraries=installed_libraries())
    for device in cuda_devices()[:1]:
        board = msgspec.structs.replace(board, sm=device.sm, gpu=device.name)
        if board.soc is None:
            reading = gpu_reading(device.bus_id)
            board = msgspec.structs.replace(
                board,
                gpu_memory_bytes=device.memory_bytes,
                gpu_memory_free_bytes=reading.memory_free_bytes if reading else None,
            )
    return board


def board_from_files(root: Path, *, libraries: Mapping[str, str] | None = None) -> Board:
    """Return the board whose root file system is at ``root``.

    Args:
        root: ``/``, or a copy of the files of a board.
        libraries: What Python could import there; nothing if None.
    """
    tree = root / "proc/device-tree"
    compatible = _text(tree / "compatible")
    soc = next((chip for chip in _TEGRA_SMS if f"nvidia,{chip}" in compatible.split("\0")), None)
    total, available = _memory(root)
    trtexec = root / _TRTEXEC
    return Board(
        model=_text(tree / "model").strip("\0 \n") or _cpu_name(root) or platform.machine(),
        machine="aarch64" if soc else platform.machine(),
        soc=soc,
        l4t=_l4t(root),
        sm=_TEGRA_SMS.get(soc or ""),
        gpu=_TEGRA_GPUS.get(soc or ""),
        memory_bytes=total,
        memory_available_bytes=available,
        power_mode=_power_mode(root),
        libraries=dict(libraries or {}),
        trtexec=str(trtexec) if trtexec.is_file() else None,
        trtexec_version=_packaged_tensorrt(root),
    )


def installed_libraries() -> dict[str, str]:
    """Return ``{library: version}`` of the inference libraries that Python would find; imports none."""
    versions = {library: installed_version(library) for library in MODULES}
    return {library: version for library, version in versions.items() if version is not None}


def conditions(root: Path = Path("/")) -> Conditions:
    """Read temperatures, clocks, power and throttling; what cannot be read is left out."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    temperatures = {
        _text(zone / "type").strip() or zone.name: degrees / 1000
        for zone in zones
        if (degrees := _number(zone / "temp")) is not None
    }
    clocks = {}
    if (khz := _number(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")) is not None:
        clocks["cpu0"] = khz / 1e3
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        if _GPU_CLOCK.search(device.name) and (hertz := _number(device / "cur_freq")) is not None:
            clocks["gpu"] = hertz / 1e6
    throttled = tuple(
        _text(device / "type").strip() or device.name
        for device in sorted((root / "sys/class/thermal").glob("cooling_device*"))
        # a fan that turns holds nothing back
        if (_number(device / "cur_state") or 0) > 0 and "fan" not in _text(device / "type")
    )
    if (reading := _discrete_gpu(root)) is not None:
        if reading.temperature_c is not None:
            temperatures["gpu"] = float(reading.temperature_c)
        clocks.update(reading.clocks_mhz)
        throttled += reading.throttled
    return Conditions(
        temperatures_c=temperatures, clocks_mhz=clocks, rails_mw=rails_mw(root), throttled=throttled
    )


def rails_mw(root: Path = Path("/")) -> dict[str, float]:
    """Return the present power of each rail that an INA sensor watches, in milliwatts; empty without one.

    A discrete GPU counts as the rail ``GPU``: its management library tells the power of its board.
    """
    rails = {}
    for sensor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if not _text(sensor / "name").startswith("ina"):
            continue
        for label in sorted(sensor.glob("in*_label")):
            index = label.name[2:].partition("_")[0]
            millivolts = _number(sensor / f"in{index}_input")
            milliamperes = _number(sensor / f"curr{index}_input")
            if millivolts is not None and milliamperes is not None:
                rails[_text(label).strip()] = millivolts * milliamperes / 1e3
        # The sensor of a whole Thor has no labels and tells its power itself, in microwatts.
        for power in sorted(sensor.glob("power*_input")):
            if (microwatts := _number(power)) is not None:
                rails[f"{_text(sensor / 'name').strip()} {power.name.partition('_')[0]}"] = microwatts / 1e3
    if (reading := _discrete_gpu(root)) is not None and reading.power_mw is not None:
        rails["GPU"] = float(reading.power_mw)
    return rails


def _discrete_gpu(root: Path) -> GpuReading | None:
    """Read the first GPU of this very machine, unless it is a Jetson's, whose files say more."""
    if root != Path("/") or not (devices := cuda_devices()):
        return None
    return gpu_reading(devices[0].bus_id)


def _l4t(root: Path) -> str | None:
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    return f"{found[1]}.{found[2]}" if found else None


def _power_mode(root: Path) -> str | None:
    found = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if found is None:
        return None
    number = int(found[1])
    for line in _text(root / "etc/nvpmodel.conf").splitlines():
        named = re.match(r"\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", line)
        if named and int(named[1]) == number:
            return named[2]
    return f"mode {number}"


def _memory(root: Path) -> tuple[int, int]:
    sizes = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if (digits := value.split()) and digits[0].isdigit():
            sizes[name] = int(digits[0]) * 1024
    total, available = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    limit, used = (_number(root / f"sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None:
        total = min(total, int(limit))
        available = min(available, max(0, int(limit - (used or 0))))
    return total, available


def _packaged_tensorrt(root: Path) -> str | None:
    """Return the version of libnvinfer by Debian's package list, such as ``10.3.0``.

    A package that was removed stays in the list with its last version; only an installed one counts.
    """
    package, installed = "", False
    for line in _text(root / "var/lib/dpkg/status").splitlines():
        if line.startswith("Package: "):
            package, installed = line[9:], False
        elif line.startswith("Status: "):
            installed = line.split()[-1] == "installed"
        elif line.startswith("Version: ") and installed and re.fullmatch(r"libnvinfer\d+", package):
            return ".".join(line[9:].partition("-")[0].split(".")[:3])
    return None


def _cpu_name(root: Path) -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else None


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
