"""The ``trtexec`` command lines that do by hand what the builder does.

Lane B graphs carry their precision and are built strongly typed; lane A, for TensorRT 8.5, takes
precision flags and is told to obey the graph's Q/DQ. They are the flags of ``finalize.sh``, which a
test compares. Source: the ``trtexec`` pages of the TensorRT 8.5 and 10 developer guides, and
``samples/common/sampleOptions.cpp`` of NVIDIA/TensorRT at 8.6, 10.3, 10.16 and 11.1: ``--buildOnly``
became ``--skipInference`` with 8.6 and was gone in 10.3; 11 dropped ``--fp16``, ``--int8`` and the
precision constraints, which lane B never uses, and takes ``--stronglyTyped`` as a no-op.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from edgeglm.engines.plan import Shape, ShapeRange
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.schema import RuntimeVersion, version_tuple

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"
_FLAGS = {
    "version_compatible": "--versionCompatible",
    "hardware_compatible": "--hardwareCompatibilityLevel=ampere+",
    "refit": "--refit",
    "weight_streaming": "--allowWeightStreaming",
}


def trtexec_arguments(
    onnx: str,
    plan: str,
    *,
    profile: Mapping[str, ShapeRange],
    precision: str,
    runtime: RuntimeVersion,
    fp32_nodes: Sequence[str] = (),
    options: BuildOptions | None = None,
    timing_cache: str | None = None,
    program: str = TRTEXEC,
) -> list[str]:
    """Return the command that builds one plan.

    Args:
        onnx: Path of the model.
        plan: Path of the plan to write.
        profile: Whole shapes of every dynamic input, no -1.
        precision: Of the graph's matrix products.
        runtime: The TensorRT release that runs the command.
        fp32_nodes: What a builder that may choose FP16 has to keep in FP32; lane A only, where the steps
            of a normalization overflow in FP16.
        options: What the builder may do besides, legal for this release; the defaults if None.
        timing_cache: Where the times of tactics are kept from build to build; one file for each plan and
            release.
        program: Where ``trtexec`` is.
    """
    arguments = [program, f"--onnx={onnx}", f"--saveEngine={plan}"]
    for flag, end in (("minShapes", "min"), ("optShapes", "opt"), ("maxShapes", "max")):
        if profile:
            shapes = ",".join(f"{name}:{_written(getattr(r, end))}" for name, r in profile.items())
            arguments.append(f"--{flag}={shapes}")
    if timing_cache is not None:
        arguments.append(f"--timingCacheFile={timing_cache}")
    if runtime.lane == "A":
        arguments.append("--fp16")
        if precision == "int8":
            arguments.append("--int8")
        if precision == "int8" or fp32_nodes:
            arguments.append("--precisionConstraints=obey")
        if fp32_nodes:
            pairs = ",".join(f"{node}:fp32" for node in fp32_nodes)
            arguments += [f"--layerPrecisions={pairs}", f"--layerOutputTypes={pairs}"]
    else:
        arguments.append("--stronglyTyped")
    arguments += option_arguments(options or BuildOptions())
    older = version_tuple(runtime.version)[:2] < (8, 6)
    arguments.append("--buildOnly" if older else "--skipInference")
    return arguments


def option_arguments(options: BuildOptions) -> list[str]:
    """Return the flags of the options; batches are no flags but part of the shapes."""
    arguments = [_FLAGS[name] for name in options.chosen]
    if options.workspace_bytes is not None:  # in MiB; --workspace was gone in 10.3
        arguments.append(f"--memPoolSize=workspace:{options.workspace_bytes / (1 << 20):g}")
    if options.optimization_level is not None:
        arguments.append(f"--builderOptimizationLevel={options.optimization_level}")
    return arguments


def command_line(arguments: list[str]) -> str:
    """Quote a command for a POSIX shell."""
    return shlex.join(arguments)


def _written(shape: Shape) -> str:
    return "x".join(map(str, shape))
