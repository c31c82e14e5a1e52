"""What a profile or a recipe may ask of the builder besides (``[engine]``), and where that is legal.

Sources: ``BuilderFlag`` and ``HardwareCompatibilityLevel`` in NVIDIA/TensorRT ``include/NvInfer.h``,
"Engine Compatibility" of the TensorRT documentation (no hardware compatibility on JetPack), and what
TensorRT-RTX 1.7 was seen to do: it refuses version compatibility and overhears the hardware's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

import msgspec

from edgeglm.core.recipe import EngineConfig

Range = tuple[int, int, int]
"""The least, the usual and the largest size of a dynamic axis."""

_JETSON_SMS = (53, 62, 72, 87, 110)
FLAGS = ("version_compatible", "refit", "weight_streaming", "hardware_compatible")


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the builder may do besides. The defaults are the library's own.

    Attributes:
        version_compatible: The plan also loads in later releases, by other programs:
            edgeglm itself runs a plan only with the very version that built it.
        hardware_compatible: The plan runs on every GPU from Ampere on, and slower than one for its own GPU.
        refit: Weights may be replaced in the finished engine.
        weight_streaming: Weights may stay in host memory.
        workspace_bytes: The most scratch memory a layer may use; None for no limit.
        optimization_level: 0 (quick build) to 5 (slow build); None for the library's default.
        usual_batch: What the engine is tuned for.
        largest_batch: The most that it takes at once. The runtime sends up to 32.
        bucket_batches: Batches with an optimization profile, and on the device a context and a CUDA graph,
            of their own: quicker calls for a longer build and a larger plan. TensorRT-RTX needs no profiles
            for them. None for 1, the usual and the largest; an empty list for none.
    """

    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    weight_streaming: bool = False
    workspace_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)] | None = None
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    usual_batch: Annotated[int, msgspec.Meta(ge=1)] = 8
    largest_batch: Annotated[int, msgspec.Meta(ge=32)] = 32
    bucket_batches: tuple[Annotated[int, msgspec.Meta(ge=1)], ...] | None = None

    @property
    def batch(self) -> Range:
        """The least, the usual and the largest batch of an engine."""
        return (1, min(self.usual_batch, self.largest_batch), self.largest_batch)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The batches with profiles of their own, rising; none is above the largest batch."""
        asked = self.bucket_batches
        if asked is None:
            asked = (1, self.usual_batch, self.largest_batch)
        return tuple(sorted({min(size, self.largest_batch) for size in asked}))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the flags that are set."""
        return tuple(name for name in FLAGS if getattr(self, name))


def with_recipe(own: BuildOptions | None, asked: EngineConfig | None) -> BuildOptions | None:
    """Return a profile's options with what a recipe asks in their place; None if neither asks anything."""
    changes = {
        name: value
        for name in EngineConfig.__struct_fields__
        if (value := getattr(asked, name, None)) is not None
    }
    return msgspec.structs.replace(own or BuildOptions(), **changes) if changes else own


def option_refusals(options: BuildOptions, *, library: str, version: str, sm: int | None) -> Iterator[str]:
    """Yield why an option is not legal for one release on one device; the last clause is the way out.

    Args:
        options: What was asked for.
        library: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        version: Of the library, such as ``"10.3.0"``.
        sm: Compute capability without the dot.
    """
    if library == "tensorrt-rtx":
        if options.version_compatible:
            yield "TensorRT-RTX ships no lean runtime for such plans; leave version_compatible out"
        if options.hardware_compatible:
            yield (
                "TensorRT-RTX overhears hardware_compatible, one of its engines holds code for several "
                "compute capabilities instead; leave hardware_compatible out and build for several targets"
            )
        return
    release = _release(version)
    since = {
        "version_compatible": (options.version_compatible, (8, 6)),
        "hardware_compatible": (options.hardware_compatible, (8, 6)),
        "weight_streaming": (options.weight_streaming, (10, 0)),
        "optimization_level": (options.optimization_level is not None, (8, 6)),
    }
    for name, (asked, first) in since.items():
        if asked and release < first:
            yield f"{name} begins with TensorRT {first[0]}.{first[1]} and this is {version}; leave {name} out"
    if options.hardware_compatible and sm in _JETSON_SMS:
        yield (
            "TensorRT has no hardware compatibility on JetPack; leave hardware_compatible out and finalize "
            "on each board"
        )
    if options.hardware_compatible and sm is not None and sm < 80:
        yield (
            f"hardware-compatible plans begin with Ampere (SM 8.0) and this is SM {sm // 10}.{sm % 10}; "
            "leave hardware_compatible out"
        )


def _release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
