"""The precision plan: which node computes in what and why, as a file that a person reads and edits.

edgeglm quantize model.onnx --data calibration --output out       # writes out/plan.toml
$EDITOR out/plan.toml                                             # precision = "high"
edgeglm quantize model.onnx --data calibration --output out2 --precision-plan out/plan.toml
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgeglm.calibration.schemes import Method, scheme_named
from edgeglm.core.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SHOWN = 5  # names of nodes in a message

Precision = Literal["int8", "high"]
Embeddings = Literal["high", "int8", "int4"]


class PlanGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nodes of one precision.

    Attributes:
        name: What the group is called; free.
        precision: "int8", or "high": the model's own, or what ``high_precision`` says.
        method: How the ranges of its activations are found.
        nodes: Names of the nodes in the FP32 model.
        reason: What was measured; free text.
    """

    name: str
    precision: Precision
    method: Method = "max"
    nodes: tuple[str, ...]
    reason: str = ""


class PrecisionPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole plan.

    Attributes:
        schema_version: Of this file.
        source_sha256: Of the FP32 model that it was made for; another model is refused.
        scheme: Name of the INT8 scheme; see ``edgeglm.calibration.schemes``.
        high_precision: What everything else computes in.
        smooth: SmoothQuant's alpha, 0 for none: how far outliers move from activations into weights.
        embeddings: Weight-only precision of embedding tables; "int4" is ONNX Runtime's alone.
        residuals: Whether residual sums read the Q/DQ pair that their other side has, so that TensorRT adds
            in the kernels of INT8 products; for the scheme "tensorrt" alone.
        summary: What it reached when it was measured; free text.
        calibration: What its ranges were found on; free text, rewritten whenever the plan is applied.
        group: All groups; nodes in none stay in high precision.
    """

    schema_version: Literal[1] = 1
    source_sha256: str
    scheme: str
    high_precision: Literal["fp32", "fp16"] = "fp32"
    smooth: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    embeddings: Embeddings = "high"
    residuals: bool = False
    summary: str = ""
    calibration: str = ""
    group: tuple[PlanGroup, ...]

    @property
    def int8_nodes(self) -> dict[str, Method]:
        """The INT8 nodes with their methods."""
        return {
            node: group.method for group in self.group if group.precision == "int8" for node in group.nodes
        }

    def with_precisions(self, high: Collection[str]) -> PrecisionPlan:
        """Return the plan with exactly the groups of these names in high precision."""
        groups = tuple(
            msgspec.structs.replace(group, precision="high" if group.name in high else "int8")
            for group in self.group
        )
        return msgspec.structs.replace(self, group=groups)


def plan_to_toml(plan: PrecisionPlan) -> str:
    """Return the plan as TOML, each group under a heading of its own."""
    import tomli_w

    return tomli_w.dumps(msgspec.to_builtins(plan), multiline_strings=False)


def plan_from_toml(text: str, *, origin: str) -> PrecisionPlan:
    """Parse a plan. Raises UserError that names the key."""
    try:
        plan = msgspec.convert(tomllib.loads(text), PrecisionPlan)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{origin} is no precision plan: {error}; mend that line") from error
    scheme = scheme_named(plan.scheme)
    besides = {"onnxruntime": "fp32", "modelopt": plan.high_precision}[scheme.maker]
    if scheme.activation == "float8":
        besides = "fp16"
    if plan.high_precision != besides:
        raise UserError(
            f"{origin} asks for {plan.high_precision}, and {plan.scheme!r} computes the rest in {besides}; "
            f'set high_precision = "{besides}"'
        )
    if plan.residuals and plan.scheme != "tensorrt":
        raise UserError(
            f"{origin} quantizes residuals by {plan.scheme!r}, and only 'tensorrt' leaves that to the plan; "
            "set residuals = false"
        )
    return plan


def plan_from_file(path: Path) -> PrecisionPlan:
    """Read a plan file. Raises UserError when it is absent or broken."""
    try:
        return plan_from_toml(path.read_text("utf-8"), origin=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the precision plan {path}: {error}; give a TOML file") from error


def require_fitting(plan: PrecisionPlan, sha256: str, nodes: Collection[str]) -> None:
    """Raise UserError unless the plan was made for this model and every node it names exists once."""
    for group in plan.group:
        for node in group.nodes:
            if node not in nodes:
                near = get_close_matches(node, list(nodes), 1, cutoff=0.5)
                some = ", ".join(sorted(nodes)[:_SHOWN])
                last = f"did you mean {near[0]!r}?" if near else f"name one of them, such as {some}"
                raise UserError(
                    f"group {group.name!r} of the plan names a node {node!r} that the model does not have "
                    f"among the {len(nodes)} that can be INT8; {last}"
                )
    listed = [node for group in plan.group for node in group.nodes]
    if twice := sorted({node for node in listed if listed.count(node) > 1}):
        raise UserError(f"the plan names {twice[0]!r} in two groups; leave it in one")
    if plan.source_sha256 != sha256:
        raise UserError(
            f"the plan was made for the model {plan.source_sha256[:12]}..., and this is {sha256[:12]}...; "
            "set source_sha256 in the plan if its nodes are the same, or search again"
        )
    if not plan.int8_nodes:
        raise UserError('the plan has no INT8 node; set precision = "int8" in some group')
