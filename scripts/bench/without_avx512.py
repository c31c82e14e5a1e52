"""Run a bench as on a processor with AVX2 only, on one that has AVX-512.

    .venv/bin/python scripts/bench/without_avx512.py scripts/bench/quantization.py files speed [...]

ONNX Runtime takes its kernels by what CPUID says, and has no setting for it. Here it runs from a copy in
which each CPUID instruction is a trap, and a preloaded library (without_avx512.c, built with `cc`) answers it
with AVX-512, VNNI and AMX taken out; edgeglm, which reads /proc/cpuinfo, is told the same. So the kernels and
the saturation of 16-bit sums are those of AVX2; caches and clock stay those of the processor at hand. A
processor without AVX-512 needs none of this.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPUID, TRAP = bytes.fromhex("0fa2"), bytes.fromhex("cc90")
CHECK = (
    "from edgeglm.engines.environment import cpu_flags as f; import onnxruntime as o; print(*f()); print(o)"
)


def main(command: list[str]) -> int:
    """Make the copy, check that it is what runs, and run the command in it."""
    if not command or not shutil.which("cc") or not shutil.which("objdump"):
        raise SystemExit(f"{__doc__}\nneeds a script to run, 'cc' and 'objdump'; install gcc and binutils")
    with tempfile.TemporaryDirectory() as folder:
        environment = prepared(Path(folder))
        seen = subprocess.run(
            [sys.executable, "-c", CHECK], env=environment, check=True, capture_output=True, text=True
        ).stdout
        if folder not in seen or "avx512" in seen or "avx2" not in seen:
            raise SystemExit(f"AVX-512 could not be hidden, or there is no AVX2: {seen}")
        return subprocess.run([sys.executable, *command], env=environment, check=False).returncode


def prepared(folder: Path) -> dict[str, str]:
    """Fill a folder with the copy, the library and the text of /proc/cpuinfo; return the environment."""
    found = importlib.util.find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    package = folder / "onnxruntime"
    shutil.copytree(Path(found.origin).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (binary,) = (package / "capi").glob("onnxruntime_pybind11_state*.so")
    trapped(binary)
    library = folder / "without_avx512.so"
    source = HERE / "without_avx512.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    words = Path("/proc/cpuinfo").read_text()
    told = folder / "cpuinfo"
    told.write_text(re.sub(r" (?:avx512|amx)\w*| avx_vnni\w*", "", words))
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "WITHOUT_AVX512": str(told),
    }


def trapped(binary: Path) -> None:
    """Replace each CPUID instruction of a shared library by a trap and a NOP, which are as long."""
    content = bytearray(binary.read_bytes())
    segments = list(loaded(binary))
    listing = subprocess.run(["objdump", "-d", binary], check=True, capture_output=True, text=True).stdout
    for found in re.finditer(r"^\s*([0-9a-f]+):\s+0f a2\s+cpuid", listing, re.MULTILINE):
        address = int(found[1], 16)
        place = next(
            address - start + offset for start, offset, size in segments if 0 <= address - start < size
        )
        assert content[place : place + 2] == CPUID
        content[place : place + 2] = TRAP
    binary.write_bytes(content)


def loaded(binary: Path) -> Iterator[tuple[int, int, int]]:
    """Yield address, place in the file and size of each segment that is loaded."""
    listing = subprocess.run(["objdump", "-p", binary], check=True, capture_output=True, text=True).stdout
    pattern = r"LOAD off\s+0x([0-9a-f]+) vaddr 0x([0-9a-f]+).*\n\s+filesz 0x([0-9a-f]+)"
    for offset, start, size in re.findall(pattern, listing):
        yield int(start, 16), int(offset, 16), int(size, 16)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
