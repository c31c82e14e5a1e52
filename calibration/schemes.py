"""INT8 schemes, and FP8, as data: which integers, and whether values stay integers between nodes.

Which one pays depends on the instructions of the machine, so that schemes are measured, never guessed:
without VNNI, ``u8 x s8`` products saturate in 16 bits unless weights have 7 bits (``reduced``;
ONNX Runtime, Quantize ONNX Models), and ``s8 x s8`` has fast kernels on ARM but not on x86.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.targets.schema import Target

Activation = Literal["uint8", "int8", "dynamic", "float8"]
Method = Literal["max", "entropy", "percentile", "mse"]
METHODS: tuple[Method, ...] = ("max", "entropy", "percentile", "mse")


class Scheme(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to compute in INT8. Weights are signed, with one scale for each output channel.

    Attributes:
        name: What plans call it.
        activation: "uint8" asymmetric or "int8" symmetric, with calibrated ranges; "dynamic": unsigned,
            from each batch's own range, which needs no calibration and costs a pass over the values;
            "float8": E4M3, for targets that have it.
        reduced: Weights of 7 bits.
        chains: Activation functions, residual sums and pools between two INT8 nodes stay INT8 too,
            which convolutions need to pay; else only the inputs of products are quantized.
        maker: The library that writes the file.
    """

    name: str
    activation: Activation
    reduced: bool = False
    chains: bool = False
    maker: Literal["onnxruntime", "modelopt"] = "onnxruntime"


_SHIPPED = (
    Scheme(name="dynamic", activation="dynamic"),
    Scheme(name="dynamic-reduced", activation="dynamic", reduced=True),
    Scheme(name="u8s8", activation="uint8"),
    Scheme(name="u8s8-reduced", activation="uint8", reduced=True),
    Scheme(name="u8s8-chains", activation="uint8", chains=True),
    Scheme(name="u8s8-chains-reduced", activation="uint8", chains=True, reduced=True),
    Scheme(name="s8s8", activation="int8"),
    Scheme(name="s8s8-reduced", activation="int8", reduced=True),
    Scheme(name="s8s8-chains", activation="int8", chains=True),
    Scheme(name="s8s8-chains-reduced", activation="int8", chains=True, reduced=True),
    Scheme(name="tensorrt", activation="int8", maker="modelopt"),
    Scheme(name="fp8", activation="float8", maker="modelopt"),
)
SCHEMES = {scheme.name: scheme for scheme in _SHIPPED}
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni"}
_ARM = {"asimddp", "i8mm", "asimd"}


def x86_sums_16_bits(flags: Collection[str]) -> bool:
    """Whether a CPU with these flags adds products of 8 bits in 16, where they saturate without a word."""
    return not (_DOT_PRODUCTS | _ARM) & set(flags)


def scheme_named(name: str) -> Scheme:
    """Return a shipped scheme. Raises UserError that lists the known ones."""
    if name not in SCHEMES:
        raise unknown_name("INT8 scheme", name, SCHEMES)
    return SCHEMES[name]


def require_scheme(scheme: Scheme, target: Target) -> None:
    """Raise UserError unless a scheme's file is one that the target's runtime computes in integers or FP8."""
    by = "onnxruntime" if target.kind == "cpu" else "modelopt"
    if scheme.maker == by:
        return
    fitting = sorted(one.name for one in SCHEMES.values() if one.maker == by)
    why = (
        f"is for TensorRT, and {target.name} runs ONNX Runtime"
        if target.kind == "cpu"
        else f"is ONNX Runtime's, and {target.name} runs TensorRT, which takes symmetric Q/DQ only"
    )
    raise UserError(f"the scheme {scheme.name!r} {why}; take one of {', '.join(fitting)}")


def cpu_schemes(flags: Collection[str], *, convolutions: bool) -> tuple[Scheme, ...]:
    """Return the schemes worth measuring on a CPU with these flags of ``/proc/cpuinfo``, the likeliest first.

    Convolutions have no dynamic scheme: ``ConvInteger`` is several times slower than FP32.
    """
    if _ARM & set(flags):
        names = ["s8s8-chains", "u8s8-chains"] if convolutions else ["dynamic", "s8s8", "u8s8"]
    else:
        names = ["u8s8-chains", "s8s8-chains"] if convolutions else ["dynamic", "u8s8", "s8s8"]
        if x86_sums_16_bits(flags):
            names = [f"{name}-reduced" for name in names]
    return tuple(SCHEMES[name] for name in names)
