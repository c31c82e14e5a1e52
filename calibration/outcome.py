"""What ``edgeglm quantize`` is asked for, and what it reports."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgeglm.calibration.origin import Origin
from edgeglm.calibration.plan import Embeddings
from edgeglm.calibration.schemes import Method
from edgeglm.calibration.search_report import SearchReport

OpType = Literal["Conv", "Gemm", "MatMul"]
OP_TYPES: tuple[OpType, ...] = ("Conv", "Gemm", "MatMul")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is quantized.

    Attributes:
        gate: The least share of FP32's score.
        evaluations: The most files that the search measures.
        methods: How ranges may be found.
        scheme: One scheme's name, or "" for all that the target may like.
        threads: Threads inside an operator, for timing too.
        smooth: SmoothQuant's alpha for what MatMuls read; 0 for none.
        embeddings: Weight-only precision of embedding tables.
        op_types: The products that may become INT8; without "Conv" a vision transformer is quantized in
            its linear layers only.
        rank: Whether each group is measured alone even where the whole model passes.
    """

    gate: float = 0.99
    evaluations: int = 40
    methods: tuple[Method, ...] = ("max", "percentile", "entropy", "mse")
    scheme: str = ""
    threads: int = 1
    smooth: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    embeddings: Embeddings = "high"
    op_types: tuple[OpType, ...] = OP_TYPES
    rank: bool = False


class Fp16File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``fp16.onnx``, which a device times beside the INT8 file."""

    sha256: str
    size_bytes: int
    kept: float
    cosine: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``report.json``: what was searched and what was written.

    Attributes:
        source, source_sha256: The FP32 file's name and digest.
        target: Its name.
        metric: "cosine", or the user's function.
        samples: How many samples ranges were found on, and how many measured cosines.
        calibration: Where they came from.
        search: All evaluations, the ranking and the plan. With a user's plan there is only that one.
        sha256, size_bytes: Of ``model.onnx``; "" and 0 when nothing was written.
        score, kept, cosine: Of ``model.onnx`` itself, measured once more.
        speedup: Over what ``search.beside`` says, here; None where the target is another machine.
        left_high: Products that the plan has in INT8 and ModelOpt left in high precision: too narrow to pay.
        fp32_nodes: Nodes that a builder which chooses FP16 itself (TensorRT 8.5) must keep in FP32.
        fp16: The other file that travels to a target which computes in FP16.
        fp16_left_out: Why it has none.
    """

    source: str
    source_sha256: str
    target: str
    metric: str
    samples: tuple[int, int]
    calibration: Origin
    search: SearchReport
    sha256: str = ""
    size_bytes: int = 0
    source_bytes: int = 0
    score: float | None = None
    kept: float | None = None
    cosine: float | None = None
    speedup: float | None = None
    left_high: tuple[str, ...] = ()
    fp32_nodes: tuple[str, ...] = ()
    fp16: Fp16File | None = None
    fp16_left_out: str = ""

    @property
    def passed(self) -> bool:
        """Whether a model was written."""
        return bool(self.sha256)
