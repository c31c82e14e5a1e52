"""The schema of a target profile, and how profiles are found and read.

A profile is a TOML file. ``profiles/`` holds the ones that ship; a path ending in ``.toml`` is
the user's own. Every number carries its source, and says so when nobody has verified it.
"""

from __future__ import annotations

import importlib.resources
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.recipe import EngineConfig
from edgeglm.targets.build_options import BuildOptions, with_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

S = TypeVar("S", bound=msgspec.Struct)
TENSORRT_RTX_SMS = (75, 80, 86, 89, 120, 121)
"""What TensorRT-RTX 1.7 offers in ``ComputeCapability``; it does not cover Jetson."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "fp4"]
Builder = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
Lane = Literal["A", "B"]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Text = Annotated[str, msgspec.Meta(min_length=1)]
_LARGEST = 1e9
"""Far above any figure of a device, and below infinity."""
Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+){0,3}$")]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all profile tables: immutable, every key known."""


class Figure(_Table, frozen=True, kw_only=True):
    """A number with where it was seen. ``verified = false`` marks one from memory or derivation."""

    value: Annotated[float, msgspec.Meta(gt=0, le=_LARGEST)]
    source: Text
    verified: bool = True


class Peak(_Table, frozen=True, kw_only=True):
    """Peak dense rates of the GPU alone: TFLOPS for floats, TOPS for INT8. Sparse rates are not used."""

    fp32_tflops: Figure | None = None
    fp16_tflops: Figure | None = None
    int8_tops: Figure | None = None
    fp8_tflops: Figure | None = None


class Dla(_Table, frozen=True, kw_only=True):
    """The deep-learning accelerator beside the GPU."""

    cores: Annotated[int, msgspec.Meta(ge=1)]
    source: Text
    verified: bool = True
    int8_tops: Figure | None = None


class RuntimeVersion(_Table, frozen=True, kw_only=True):
    """One release of the inference library that this target can have, and what comes with it."""

    library: Builder
    version: Version
    source: Text
    verified: bool = True
    lane: Lane | None = None
    cuda: Version | None = None
    python: Version | None = None
    jetpack: str | None = None
    l4t: str | None = None
    dla: bool = False


class Target(_Table, frozen=True, kw_only=True):
    """One device, one family of devices, or the plain CPU.

    Attributes:
        sm: Compute capability without the dot: 87 is 8.7. None for a family and the CPU.
        memory_gb: Memory that weights and activations share, in GB.
        bandwidth_gb_s: Memory bandwidth in GB/s.
        precisions: Legal precisions of matrix products under ``builder``, the preferred first.
        lanes: Portable ONNX variants that its TensorRT versions take, the preferred first.
        builder: The library that makes its engines. None for a family: each member has its own.
        runtimes: The library releases it can have, the oldest first.
        engine: What its builder is asked for besides; None for the library's defaults.
    """

    name: Name
    title: Text
    kind: Literal["device", "family", "cpu"]
    schema: Literal[1] = 1
    members: tuple[str, ...] = ()
    arch: Literal["aarch64", "x86_64"] | None = None
    builder: Builder | None = None
    sm: Annotated[int, msgspec.Meta(ge=50, le=999)] | None = None
    memory_gb: Figure | None = None
    bandwidth_gb_s: Figure | None = None
    peak: Peak = Peak()
    dla: Dla | None = None
    precisions: tuple[Precision, ...] = ()
    lanes: tuple[Lane, ...] = ()
    runtimes: tuple[RuntimeVersion, ...] = ()
    notes: tuple[str, ...] = ()
    engine: BuildOptions | None = None


class ResolvedTarget(_Table, frozen=True, kw_only=True):
    """A target with the profiles of its members, as a bundle carries it: nothing is looked up again.

    A target that is no family is its own one member.
    """

    target: Target
    members: tuple[Target, ...]


def known_targets() -> list[str]:
    """Return the names of the shipped profiles, sorted."""
    folder = importlib.resources.files(__name__.rpartition(".")[0]) / "profiles"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def load_target(name_or_path: str) -> Target:
    """Return a shipped profile by name, or the user's own by a path that ends in ``.toml``.

    Raises UserError for an unknown name (with the nearest one), an unreadable file, or a profile
    that breaks the schema.
    """
    if name_or_path.endswith(".toml"):
        return _from_file(Path(name_or_path))
    if name_or_path not in known_targets():
        remedy = "use one of those, or give the path of your own .toml file"
        raise unknown_name("target", name_or_path, known_targets(), remedy)
    return _shipped(name_or_path)


def members_of(target: Target) -> tuple[Target, ...]:
    """Return the profiles of a family's members; any other target is its own one member."""
    if target.kind != "family":
        return (target,)
    members = tuple(load_target(name) for name in target.members)
    for member in members:
        if member.kind == "family":
            raise UserError(
                f"target {target.name!r}: member {member.name!r} is itself a family; list its devices instead"
            )
    names = [member.name for member in members]
    if len(set(names)) != len(names):
        raise UserError(f"target {target.name!r} lists a member twice: {', '.join(names)}; keep each once")
    return members


def resolve_target(target: Target, engine: EngineConfig | None = None) -> ResolvedTarget:
    """Return the target with its members' profiles inside, what a recipe asks of their builders, no path."""
    members = tuple(
        msgspec.structs.replace(member, engine=with_recipe(member.engine, engine))
        if member.builder != "onnxruntime"
        else member
        for member in members_of(target)
    )
    if target.kind != "family":
        return ResolvedTarget(target=members[0], members=members)
    target = msgspec.structs.replace(target, members=tuple(member.name for member in members))
    return ResolvedTarget(target=target, members=members)


def target_from_toml(text: str, *, origin: str) -> Target:
    """Parse and check one profile. Raises UserError that names ``origin`` and the key."""
    target = _converted(text, Target, origin)
    for complaint in complaints_about(target):
        raise UserError(f"{origin}: {complaint}")
    return target


def resolved_from_toml(text: str, *, origin: str) -> ResolvedTarget:
    """Parse the ``target.toml`` of a bundle. Raises UserError that names ``origin`` and the key."""
    resolved = _converted(text, ResolvedTarget, origin)
    for one in (resolved.target, *resolved.members):
        for complaint in complaints_about(one):
            raise UserError(f"{origin}: {complaint}")
    if not resolved.members:
        raise UserError(f"{origin}: no members; write it again with 'edgeglm build'")
    return resolved


def toml_from_resolved(resolved: ResolvedTarget) -> str:
    """Return the text that ``resolved_from_toml`` reads. Needs ``tomli_w`` (host half)."""
    import tomli_w

    return tomli_w.dumps(msgspec.to_builtins(resolved))


def complaints_about(target: Target) -> Iterator[str]:
    """Yield what is wrong with a profile beyond the types of its keys, each with its remedy."""
    if target.kind == "family":
        if not target.members:
            yield "a family needs members; list at least one profile"
        own = [key for key in _DEVICE_KEYS if getattr(target, key)]
        if own:
            yield f"a family's members carry {', '.join(own)}; remove that from the family"
        return
    if target.members:
        yield f'kind {target.kind!r} has no members; remove them or set kind = "family"'
    if not target.precisions:
        yield 'precisions is empty; list the legal ones, such as ["fp16"]'
    if target.builder is None:
        yield "builder is missing; set it to tensorrt, tensorrt-rtx or onnxruntime"
    if target.kind == "device":
        yield from _device_complaints(target)
    elif target.builder != "onnxruntime" or target.sm is not None:
        yield 'a cpu has no sm and its builder is onnxruntime; set kind = "device" for a GPU'
    if target.builder == "onnxruntime" and target.engine is not None:
        yield "ONNX Runtime builds no engine; remove [engine]"


_DEVICE_KEYS = (
    "arch", "builder", "sm", "memory_gb", "bandwidth_gb_s", "dla", "precisions", "lanes", "runtimes",
    "engine",
)  # fmt: skip


def _device_complaints(target: Target) -> Iterator[str]:
    for key in ("arch", "sm", "memory_gb", "bandwidth_gb_s"):
        if getattr(target, key) is None:
            yield f"{key} is missing; a device needs it"
    if target.builder == "tensorrt-rtx" and target.sm not in TENSORRT_RTX_SMS:
        yield (
            f"TensorRT-RTX does not build for sm = {target.sm}, only for "
            f'{", ".join(map(str, TENSORRT_RTX_SMS))}; set builder = "tensorrt"'
        )
    if target.builder != "onnxruntime" and not target.lanes:
        yield 'lanes is empty; list the portable ONNX variants it takes, such as ["B"]'
    for runtime in target.runtimes:
        if runtime.library == "tensorrt" and runtime.lane not in target.lanes:
            yield f"TensorRT {runtime.version} has lane {runtime.lane}, which lanes lacks; list it there"
        if (
            runtime.library == "tensorrt"
            and version_tuple(runtime.version) >= (10,)
            and (target.sm or 0) < 75
        ):
            yield f"TensorRT {runtime.version} needs sm >= 75; list releases before 10 only"
        if runtime.dla and target.dla is None:
            yield f"TensorRT {runtime.version} claims a DLA that the profile lacks; add [dla] or remove it"


def version_tuple(version: str) -> tuple[int, ...]:
    """Return ``"10.3.0"`` as ``(10, 3, 0)``."""
    return tuple(int(part) for part in version.split("."))


@cache
def _shipped(name: str) -> Target:
    folder = importlib.resources.files(__name__.rpartition(".")[0]) / "profiles"
    text = (folder / f"{name}.toml").read_text("utf-8")
    return target_from_toml(text, origin=f"shipped profile {name}.toml")


def _from_file(path: Path) -> Target:
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no target profile at {path}; give the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the target {path}: {error}; give a readable UTF-8 TOML file") from error
    target = target_from_toml(text, origin=str(path))
    members = tuple(
        str((path.parent / member).resolve()) if member.endswith(".toml") else member
        for member in target.members
    )
    return msgspec.structs.replace(target, members=members)


def _converted(text: str, kind: type[S], origin: str) -> S:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not TOML: {error}; mend that line") from error
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        if "contains unknown field" in message and " - at" not in message:
            field = message.split("`")[1]
            known = kind.__struct_fields__
            raise UserError(f"{origin}: {unknown_name('target key', field, known)}") from error
        reason, _, where = message.partition(" - at `$.")
        where = where.rstrip("`") or "the profile"
        example = importlib.resources.files(__name__.rpartition(".")[0]) / "profiles" / "t4.toml"
        raise UserError(f"{origin}: {where}: {reason}; write it as {example} does") from error
