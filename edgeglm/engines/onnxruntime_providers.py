"""Execution providers with their options, and where TensorRT's provider keeps the engines that it builds.

Source: ONNX Runtime, "TensorRT Execution Provider" (its pages): ``trt_engine_cache_enable``,
``trt_engine_cache_path``. Its files are named after the graph and not after the weights, so each model
needs a folder of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError

Provider = str | tuple[str, Mapping[str, Any]]
TENSORRT = "TensorrtExecutionProvider"


def with_options(providers: Sequence[Provider]) -> dict[str, dict[str, Any]]:
    """Return ``{name: options}``, the preferred first. Raises UserError for what is no provider."""
    found: dict[str, dict[str, Any]] = {}
    for provider in (providers,) if isinstance(providers, str) else providers:
        name, options = (provider, {}) if isinstance(provider, str) else _pair(provider)
        found[name] = dict(options)
    if not found:
        raise UserError("no ONNX Runtime provider is named; give one, such as 'CPUExecutionProvider'")
    return found


def _pair(provider: object) -> tuple[str, Mapping[str, Any]]:
    if isinstance(provider, (tuple, list)) and len(provider) == 2:
        name, options = provider
        if isinstance(name, str) and isinstance(options, Mapping):
            return name, options
    raise UserError(f"{provider!r} is no provider; give a name, or (name, {{option: value}})")


def engine_cache(model: Path, runtime_version: str) -> dict[str, Any]:
    """Return the options that keep the engines of one model from one start to the next.

    Without, each start builds them again, which takes minutes. Empty where no folder can be made.
    """
    from edgeglm.core.store import default_store_root  # needs file locks, which Windows lacks

    place = f"{sha256_file(model)[:32]}-{runtime_version}"
    folder = default_store_root() / "onnxruntime-tensorrt" / place
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to: as quick, but for the start
        return {}
    return {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(folder)}
