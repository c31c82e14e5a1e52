"""A plan from an ONNX file, through TensorRT or TensorRT-RTX alike.

Networks are strongly typed: precision is in the graph, the builder chooses none. One engine may
hold code for several compute capabilities (TensorRT-RTX); native TensorRT builds for the GPU here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from edgeglm.compile.decision import refused_here
from edgeglm.compile.layers import layer_table
from edgeglm.compile.shapes import tensor_records, whole_profiles
from edgeglm.compile.trt_api import BuilderConfig, Parser, RtxConfig, RtxModule, TrtApi, load_trt
from edgeglm.compile.trt_callbacks import BuildWatch, recorded_log
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.libraries import Library, broken
from edgeglm.engines.plan import PlanMetadata, Shape, ShapeRange
from edgeglm.engines.profiles import is_fixed
from edgeglm.targets.build_options import BuildOptions, option_refusals
from edgeglm.targets.legality import require_precision
from edgeglm.targets.schema import Target

Profile = Mapping[str, ShapeRange]


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """A finished build: the raw plan, its record, the builder's log (INFO and worse), cache and layers."""

    plan: bytes
    metadata: PlanMetadata
    log: tuple[str, ...]
    timing_cache: bytes | None = None
    layers: str | None = None

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write ``<name>.plan``, beside it ``<name>.json`` and ``<name>.log``; return the first two paths.

        Where the builder gave layers, ``<name>.layers.json`` too. The timing cache is the caller's to keep.
        """
        folder.mkdir(parents=True, exist_ok=True)
        plan, record = folder / f"{name}.plan", folder / f"{name}.json"
        plan.write_bytes(self.plan)
        (folder / f"{name}.log").write_text("\n".join([*self.log, ""]), "utf-8")
        if self.layers is not None:
            (folder / f"{name}.layers.json").write_text(self.layers, "utf-8")
        record.write_bytes(msgspec.json.format(msgspec.json.encode(self.metadata), indent=1))
        return plan, record


def engine_from_onnx(
    onnx_path: Path,
    *,
    targets: Sequence[Target],
    library: Library,
    precision: str,
    profiles: Sequence[Profile],
    progress: Progress | None = None,
    timing_cache: bytes | None = None,
    options: BuildOptions | None = None,
    variant: str = "",
    tower: str = "",
) -> EnginePlan:
    """Build one plan that serves all ``targets``.

    Args:
        onnx_path: The ONNX file, lane B.
        targets: Devices (no families); their compute capabilities go into the one plan.
        library: Who builds.
        precision: That of the graph's matrix products; checked for legality before anything else.
        profiles: One mapping an optimization profile, ``{input: ShapeRange}``; -1 in a range
            stands for the graph's own fixed size. Every dynamic input must be named.
        progress: Where the builder's phases are shown.
        timing_cache: What an earlier build of the exact same library version returned; native
            TensorRT only, TensorRT-RTX times nothing.
        options: Builder options; the defaults if None.
        variant: Recorded in the metadata.
        tower: Recorded in the metadata.

    Raises:
        UserError: the precision is illegal on a target, the library is absent or does not build
            for a target's SM, a profile does not fit the graph.
        EdgeglmError: the parser or the builder refused; the message names the nodes.
    """
    for target in targets:
        require_precision(target, precision, library=library)
    options = options or BuildOptions()
    api = load_trt(library)
    sms = _checked_sms(api, targets)
    _check_options(api, options, targets)
    started = time.perf_counter()
    watch = BuildWatch(progress or QuietProgress(), f"engine {variant} {tower}".strip())
    with recorded_log(api) as log:
        try:
            builder = api.module.Builder(log.logger)
        except (RuntimeError, TypeError) as error:  # pybind's word for "the driver does not start"
            raise broken(library, error, "mend the driver") from error
        network = builder.create_network(_strongly_typed(api))
        parser = api.module.OnnxParser(network, log.logger)  # kept: the network's weights are the parser's
        _parse(parser, onnx_path)
        config = builder.create_builder_config()
        inputs, outputs = tensor_records(network)
        whole = whole_profiles(inputs, profiles, onnx_path.name)
        buckets: tuple[dict[str, Shape], ...] = ()
        if library == "tensorrt-rtx" and not all(map(is_fixed, whole)):
            buckets = tuple(
                {name: r.max for name, r in ranges.items()} for ranges in whole if is_fixed(ranges)
            )
            whole = tuple(ranges for ranges in whole if not is_fixed(ranges))
        for ranges in whole:
            profile = builder.create_optimization_profile()
            for name, shapes in ranges.items():
                profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
            config.add_optimization_profile(profile)
        _configure(api, config, sms, options)
        if library == "tensorrt":  # in TensorRT-RTX the cache is a deprecated no-op
            _use_timing_cache(config, timing_cache)
            # Else the layer table below holds bare names, without types and without ONNX nodes.
            config.profiling_verbosity = api.module.ProfilingVerbosity.DETAILED
        with watch.attached(api, config):
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _build_error(onnx_path, library, log.errors)
        data = bytes(plan)
        cache = config.get_timing_cache() if library == "tensorrt" else None
        metadata = PlanMetadata(
            library=library,
            library_version=api.version,
            sms=sms,
            onnx_sha256=sha256_file(onnx_path),
            plan_sha256=sha256_bytes(data),
            size_bytes=len(data),
            profiles=whole,
            buckets=buckets,
            precision=precision,
            inputs=inputs,
            outputs=outputs,
            options=dict.fromkeys(options.chosen, True),
            variant=variant,
            tower=tower,
            seconds=round(time.perf_counter() - started, 3),
        )
        kept = bytes(cache.serialize()) if cache is not None else None
        # TensorRT-RTX builds for GPUs that are not here; its plans are opened on the device only.
        layers = (
            layer_table(api.module, log.logger, data, library=library, options=metadata.options)
            if library == "tensorrt"
            else None
        )
        return EnginePlan(
            plan=data, metadata=metadata, log=tuple(log.lines), timing_cache=kept, layers=layers
        )


def _checked_sms(api: TrtApi, targets: Sequence[Target]) -> tuple[int, ...]:
    """Return the compute capabilities to build for, which the library must be able to serve."""
    if not targets:
        raise UserError("no target to build an engine for; name at least one device")
    sms = tuple(sorted({target.sm for target in targets if target.sm is not None}))
    if api.library == "tensorrt-rtx":
        offered = api.buildable_sms
    else:
        offered = tuple(sorted({device.sm for device in cuda_devices()}))
        if len(sms) > 1:
            raise UserError("native TensorRT builds for one SM at a time; name one device")
    for target in targets:
        if target.sm not in offered:
            listed = ", ".join(map(str, offered)) or "none: there is no GPU here"
            raise UserError(
                f"{api.library} {api.version} cannot build for {target.name} (SM {target.sm}) on this "
                f"machine, only for SM {listed}; finalize the bundle on the device"
            )
    return sms


def _strongly_typed(api: TrtApi) -> int:
    flag = getattr(api.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if flag is None:
        raise UserError(f"TensorRT {api.version} has no strongly typed networks; build lane A with trtexec")
    return 1 << int(flag)


def _check_options(api: TrtApi, options: BuildOptions, targets: Sequence[Target]) -> None:
    """Say what this release refuses on these devices, before it fails in its own words."""
    for target in targets:
        for refusal in option_refusals(options, library=api.library, version=api.version, sm=target.sm):
            raise UserError(f"{target.name}: {refusal}")
    for refusal in refused_here(options, api.library):
        raise UserError(refusal)


def _parse(parser: Parser, onnx_path: Path) -> None:
    if not onnx_path.is_file():
        raise UserError(f"no ONNX file at {onnx_path}; give the path of a model")
    if parser.parse_from_file(str(onnx_path)):
        return
    complaints = []
    for error in map(parser.get_error, range(parser.num_errors)):
        node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
        complaints.append(node + " ".join(error.desc().split()))
    listed = "; ".join(complaints) or "the parser gave no reason"
    raise EdgeglmError(f"cannot parse {onnx_path.name}: {listed}; leave this variant out or export it anew")


def _configure(api: TrtApi, config: BuilderConfig, sms: tuple[int, ...], options: BuildOptions) -> None:
    if api.library == "tensorrt-rtx":
        rtx, capabilities = cast(RtxConfig, config), cast(RtxModule, api.module).ComputeCapability
        rtx.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            rtx.set_compute_capability(getattr(capabilities, f"SM{sm}"), index)
        # Else no call can be captured; streamed weights need memory that the library takes while it runs.
        if hasattr(api.module.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not options.weight_streaming:
            config.set_flag(api.module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for name in options.chosen:
        if name != "hardware_compatible":
            config.set_flag(getattr(api.module.BuilderFlag, name.upper()))
    if options.hardware_compatible:
        config.hardware_compatibility_level = api.module.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(api.module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def _use_timing_cache(config: BuilderConfig, blob: bytes | None) -> None:
    """Give the builder a cache to fill; one of another version or GPU is refused and started afresh."""
    for content in (blob, b"") if blob else (b"",):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def _build_error(onnx_path: Path, library: Library, errors: Sequence[str]) -> EdgeglmError:
    reason = "; ".join(" ".join(error.split()) for error in errors) or "the builder gave no reason"
    return EdgeglmError(
        f"{library} cannot build {onnx_path.name}: {reason}; "
        "leave this variant out, or change the named node's precision"
    )
