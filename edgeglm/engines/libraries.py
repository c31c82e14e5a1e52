"""The inference libraries: under which names each is imported and installed, and whether it can be.

``tensorrt`` comes with JetPack or a GPU host; ``tensorrt_rtx`` (``tensorrt_rtx_bindings`` in the split
wheels) with any x86-64 host.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any, Literal

from edgeglm.core.errors import UserError

Library = Literal["tensorrt", "tensorrt-rtx"]

MODULES: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
    "onnxruntime": ("onnxruntime",),
}
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "tensorrt": (
        "tensorrt",
        "tensorrt-cu13",
        "tensorrt-cu12",
        "tensorrt-cu13-bindings",
        "tensorrt-cu12-bindings",
    ),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}


class BrokenLibraryError(UserError):
    """A library is there and does not work: no candidate of a bundle would fare better."""


def installed_version(library: str) -> str | None:
    """Return the version of an installed library without importing it; None if it is absent."""
    if not any(_is_there(name) for name in MODULES[library]):
        return None
    for distribution in DISTRIBUTIONS[library]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"  # a system package without metadata


def imported_library(library: Library, *, absent: str) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Args:
        library: Which.
        absent: What to do without it; it ends the error's sentence.

    Raises:
        UserError: it is absent, or present and broken.
    """
    for name in MODULES[library]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                continue
            raise broken(library, error, absent) from error
        except Exception as error:  # whatever a half-installed package does when it is imported
            raise broken(library, error, absent) from error
    raise UserError(f"{library} is not installed here; {absent}")


def broken(library: str, error: Exception, remedy: str) -> BrokenLibraryError:
    """Build the error for a library that is there and does not work."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return BrokenLibraryError(f"{library} is installed but broken: {reason}; install it again, or {remedy}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported already, by something that is no module with a spec
        return True
