"""Mixed precision: products in bfloat16 where the device computes in it, everything else in float32.

Micikevicius et al. (2018), with bfloat16 (Kalamkar et al., 2019), whose range is that of float32, so no loss
needs to be scaled. Weights, gradients and the optimizer's state stay float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

Precision = Literal["float32", "bfloat16", "auto"]
#: What the kernel calls the units of a CPU that multiply bfloat16.
_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def computes_bfloat16(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether a device multiplies bfloat16 itself; a CPU without the units only emulates it."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device != "cpu":
        return False
    try:
        lines = cpuinfo.read_text("ascii", "replace").splitlines()
    except OSError:
        return False
    said = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    told = next(said, [])
    return any(flag in told for flag in _FLAGS)


def mixed(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """Return a context in which the forward pass is computed as asked."""
    wanted = precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))
    return torch.autocast(device, dtype=torch.bfloat16) if wanted else nullcontext()
