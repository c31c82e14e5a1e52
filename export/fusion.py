"""Which patterns of a graph ONNX Runtime and TensorRT fuse, and which node keeps them from the others.

ONNX Runtime is asked: its transformer optimizer and its session rewrite the graph, and what is gone is
fused. TensorRT is judged by what its documentation asks of a graph (NVIDIA TensorRT documentation, "Fused
Attention", "Working with Quantized Types"): attention's scale before the first product, Q/DQ before both
products, on both sides of a residual Add and nowhere inside a pattern. Where an engine was built, its
inspector's layers say what came of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import onnx

from edgeglm.export.anonymous import save_deterministic
from edgeglm.export.attention import attentions
from edgeglm.export.engine_layers import EngineLayer, layers_of_nodes
from edgeglm.export.gelus import gelus
from edgeglm.export.graph import Graph, model_from_file, name_of, named
from edgeglm.export.obstacles import onnxruntime_obstacle, quantizer_notes, tensorrt_obstacle
from edgeglm.export.ort_fusion import fused_by_onnxruntime
from edgeglm.export.ort_rewrites import rewrite_for_onnxruntime
from edgeglm.export.outputs import require_other_file
from edgeglm.export.patterns import Match, added_norms, conv_batch_norms, norms
from edgeglm.export.plain import plain, why_illegal
from edgeglm.export.residuals import quantized_residuals, shared_projections
from edgeglm.export.rewrites import rewrite
from edgeglm.export.rewritten import Rewritten

Runtime = Literal["onnxruntime", "tensorrt"]

#: What each runtime has a kernel for.
_EXPECTED: dict[Runtime, tuple[str, ...]] = {
    "onnxruntime": (
        "layer-norm", "rms-norm", "gelu", "attention", "conv-batch-norm", "embedding-layer-norm",
        "skip-layer-norm",
    ),
    "tensorrt": (
        "layer-norm", "rms-norm", "gelu", "attention", "conv-batch-norm", "qkv-projections",
        "quantized-residual",
    ),
}  # fmt: skip

#: What TensorRT has no layer for: its compiler puts the sum and the norm where it likes.
_NOT_APPLICABLE = ("embedding-layer-norm", "skip-layer-norm")

#: ONNX Runtime's operators that hold a whole pattern.
_FUSED_OPS: dict[str, tuple[str, ...]] = {
    "layer-norm": ("LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization"),
    "rms-norm": ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization"),
    "gelu": ("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "QLinearGelu"),
    "attention": ("Attention", "MultiHeadAttention", "QAttention"),
    "conv-batch-norm": ("Conv", "FusedConv", "QLinearConv"),
    "embedding-layer-norm": ("EmbedLayerNormalization",),
    "skip-layer-norm": ("SkipLayerNormalization", "EmbedLayerNormalization"),
}


class FusionRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pattern for one runtime.

    Attributes:
        pattern: Such as "attention".
        at: The node that stands for it.
        runtime: Who should fuse it.
        fused: Whether it does.
        into: What it becomes: an operator, or what the runtime does with it.
        blocker: The node that prevents it; "" for a fused one.
        why: One sentence with what to do; "" for a fused one.
        layers: The engine's layers that hold its nodes, where an engine was given.
        applies: Whether the runtime has anything to fuse it into; one that has not misses nothing.
    """

    pattern: str
    at: str
    runtime: Runtime
    fused: bool
    into: str = ""
    blocker: str = ""
    why: str = ""
    layers: tuple[str, ...] = ()
    applies: bool = True


class QuantizerNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Q/DQ node that breaks a fusion."""

    node: str
    why: str


class FusionReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every expected pattern, by runtime, and the Q/DQ that stand in the way of one."""

    rows: tuple[FusionRow, ...]
    quantizers: tuple[QuantizerNote, ...] = ()
    onnxruntime_ops: dict[str, int] = {}

    def missed(self, runtime: Runtime) -> tuple[FusionRow, ...]:
        """What a runtime does not fuse."""
        mine = (row for row in self.rows if row.runtime == runtime)
        return tuple(row for row in mine if row.applies and not row.fused)

    def counts(self, runtime: Runtime) -> dict[str, tuple[int, int]]:
        """``{pattern: (fused, found)}`` of the patterns that apply."""
        mine = [row for row in self.rows if row.runtime == runtime and row.applies]
        fused = Counter(row.pattern for row in mine if row.fused)
        return {
            pattern: (fused[pattern], count) for pattern, count in Counter(r.pattern for r in mine).items()
        }


def fusions_of_file(path: Path, *, layers: Sequence[EngineLayer] = ()) -> FusionReport:
    """Read an ONNX file and report on it; see :func:`fusion_report`."""
    return fusion_report(model_from_file(path), layers=layers)


def rewritten_file(path: Path, out: Path, runtime: Runtime) -> Rewritten:
    """Write a model whose patterns a runtime fuses.

    For TensorRT with standard operators, and attention's scale before its first product; for ONNX Runtime
    with its own operators, which TensorRT does not know. Raises UserError when the file cannot be read, or is
    ``out`` itself.
    """
    require_other_file(out, path)
    model = model_from_file(path)
    if runtime == "onnxruntime":
        done = rewrite_for_onnxruntime(model)
        model.opset_import.sort(key=lambda entry: str(entry.domain))
    else:
        plain(model)
        before = why_illegal(model)
        done = rewrite(model)
        assert before or not why_illegal(model), why_illegal(model)
    save_deterministic(model, out)
    return done


def fusion_report(model: onnx.ModelProto, *, layers: Sequence[EngineLayer] = ()) -> FusionReport:
    """List each expected pattern as fused, or missed with the node that prevents it.

    Args:
        model: Any ONNX model; nodes without a name are given one.
        layers: The layers of an engine that was built from it, as its inspector names them.

    Raises UserError when ONNX Runtime cannot load the model.
    """
    named(model)
    graph = Graph(model)
    matches = all_matches(graph)
    optimized = fused_by_onnxruntime(model)
    after = Graph(optimized)
    rows = [
        *(_row_onnxruntime(graph, after, m) for m in matches if m.kind in _EXPECTED["onnxruntime"]),
        *(_row_tensorrt(graph, match) for match in matches if match.kind in _EXPECTED["tensorrt"]),
        *(_no_row(match) for match in matches if match.kind in _NOT_APPLICABLE),
        *_extra_rows(graph, matches),
    ]
    if layers:
        held = layers_of_nodes(layers)
        by_anchor = {_anchor(match): match for match in matches}
        rows = [_with_layers(row, by_anchor.get(row.at), held) for row in rows]
    return FusionReport(
        rows=tuple(rows),
        quantizers=tuple(QuantizerNote(node=n, why=why) for n, why in quantizer_notes(graph, matches)),
        onnxruntime_ops=dict(Counter(node.op_type for node in optimized.graph.node).most_common()),
    )


def all_matches(graph: Graph) -> list[Match]:
    """Return every pattern of a graph."""
    found = list(norms(graph))
    return [
        *found,
        *gelus(graph),
        *attentions(graph),
        *conv_batch_norms(graph),
        *added_norms(graph, found),
    ]


def _anchor(match: Match) -> str:
    if match.kind == "attention" and "softmax" in match.parts:
        return name_of(match.parts["softmax"])
    if "add" in match.parts:
        return name_of(match.parts["add"])
    return name_of(match.parts.get("norm", match.nodes[-1]))


def _row_onnxruntime(graph: Graph, after: Graph, match: Match) -> FusionRow:
    inner = [node for node in match.nodes if node.output[0] != match.output]
    core = [match.parts[role] for role in ("bmm1", "softmax") if role in match.parts] or inner
    gone = all(
        (maker := after.made_by.get(node.output[0])) is None or maker.op_type != node.op_type for node in core
    )
    maker = after.maker(match.output)  # in FP16 it computes between casts
    ops = _FUSED_OPS[match.kind]
    there = {node.op_type for node in after.nodes}
    into = maker.op_type if maker is not None else next((op for op in ops if op in there), "")
    if gone and into in ops:
        return FusionRow(pattern=match.kind, at=_anchor(match), runtime="onnxruntime", fused=True, into=into)
    blocker, why = onnxruntime_obstacle(graph, match)
    return FusionRow(
        pattern=match.kind, at=_anchor(match), runtime="onnxruntime", fused=False, blocker=blocker, why=why
    )


def _row_tensorrt(graph: Graph, match: Match) -> FusionRow:
    found = tensorrt_obstacle(graph, match)
    blocker, why = found or ("", "")
    into = {
        "layer-norm": "a normalization layer",
        "rms-norm": "a normalization layer",
        "gelu": "a pointwise kernel",
        "attention": "a fused attention kernel",
        "conv-batch-norm": "the convolution",
    }[match.kind]
    return FusionRow(
        pattern=match.kind,
        at=_anchor(match),
        runtime="tensorrt",
        fused=found is None,
        into="" if found else into,
        blocker=blocker,
        why=why,
    )


def _no_row(match: Match) -> FusionRow:
    return FusionRow(
        pattern=match.kind,
        at=_anchor(match),
        runtime="tensorrt",
        fused=False,
        into="not applicable: no layer of its own; its compiler may join the sum and the normalization",
        applies=False,
    )


def _extra_rows(graph: Graph, matches: Sequence[Match]) -> Iterator[FusionRow]:
    """What is no pattern of one runtime's operators, but what TensorRT's documentation asks for."""
    for pattern, into, found in (
        ("qkv-projections", "one product for queries, keys and values", shared_projections(graph, matches)),
        ("quantized-residual", "the product before it, in INT8", quantized_residuals(graph)),
    ):
        for at, blocker, why in found:
            yield FusionRow(
                pattern=pattern,
                at=at,
                runtime="tensorrt",
                fused=not blocker,
                into="" if blocker else into,
                blocker=blocker,
                why=why,
            )


def _with_layers(row: FusionRow, match: Match | None, held: dict[str, list[str]]) -> FusionRow:
    """Say which layers hold the pattern's nodes: one for a pattern that was fused."""
    if row.runtime != "tensorrt":
        return row
    nodes = [row.at] if match is None else [name_of(node) for node in match.nodes]
    layers = tuple(dict.fromkeys(layer for name in nodes for layer in held.get(name, ())))
    if not layers:
        return row
    if row.fused and match is not None and match.decomposed and len(layers) > 1:
        why = f"the engine computes it in {len(layers)} layers; see them beside"
        return msgspec.structs.replace(row, fused=False, into="", blocker=row.at, why=why, layers=layers)
    return msgspec.structs.replace(row, layers=layers)
