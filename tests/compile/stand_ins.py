"""Boards, and what builds and runs engines where there is no GPU; the bundle of two tiny towers is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edgeglm.bundle.receipt import Receipt
from edgeglm.bundle.verify import open_bundle
from edgeglm.cli.finalize import _embedder
from edgeglm.compile.builder import EnginePlan
from edgeglm.compile.finalize import FinalizeOptions, Tools, finalize
from edgeglm.compile.worker import BuildRequest
from edgeglm.core.digest import sha256_bytes, sha256_file
from edgeglm.core.errors import EdgeglmError
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.engines.board import Board
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.engines.plan import PlanMetadata
from edgeglm.targets.schema import load_target, resolve_target, toml_from_resolved
from scripts.fixtures.colours import colour_bundle, colour_engine, colour_tower

LAPTOP = Board(
    model="Some CPU",
    machine="x86_64",
    memory_bytes=8 << 30,
    memory_available_bytes=6 << 30,
    libraries={"onnxruntime": "1.24.4"},
)
ORIN = Board(
    model="NVIDIA Jetson AGX Orin Developer Kit",
    machine="aarch64",
    soc="tegra234",
    l4t="36.4.3",
    sm=87,
    gpu="Ampere (Orin)",
    memory_bytes=65_800_000_000,
    memory_available_bytes=50_000_000_000,
    libraries={"onnxruntime": "1.23.2", "tensorrt": "10.3.0"},
)
NANO = msgspec.structs.replace(ORIN, memory_bytes=7_800_000_000, memory_available_bytes=5_000_000_000)
THOR = msgspec.structs.replace(ORIN, soc="tegra264", sm=110, l4t="38.2", memory_bytes=131_000_000_000)
QUICK = FinalizeOptions(rounds=7, threads=1)


def made(folder: Path, target: str = "cpu", *, int8_text: float = 1.0) -> Path:
    scales = {"fp32": 1.0, "int8": int8_text}
    parts: dict[str, Path | bytes] = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind, scale=scales[variant])
        for variant in scales
        for kind in ("image", "text")
    }
    parts["target.toml"] = toml_from_resolved(resolve_target(load_target(target))).encode()
    return colour_bundle(folder, **parts)


def portable(path: Path, threads: int) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(path, threads=threads)


class Builder:
    """A stand-in for the builder and for what runs its plans."""

    def __init__(self, *, fails: str = "") -> None:
        self.requests: list[BuildRequest] = []
        self.fails = fails

    def __call__(self, request: BuildRequest, progress: Progress) -> EnginePlan:
        self.requests.append(request)
        if request.variant == self.fails:
            raise EdgeglmError("cannot build int8/text.onnx: node 'odd'; leave this variant out")
        plan = f"plan of {request.variant} {request.tower}".encode()
        sms = tuple(target.sm for target in request.targets if target.sm)
        metadata = PlanMetadata(
            library=request.library,
            library_version="10.3.0",
            sms=sms,
            onnx_sha256=sha256_file(Path(request.onnx_path)),
            plan_sha256=sha256_bytes(plan),
            size_bytes=len(plan),
            profiles=request.profiles,
            precision=request.precision,
            inputs=(),
            outputs=(),
            variant=request.variant,
            tower=request.tower,
            seconds=1.5,
        )
        return EnginePlan(plan=plan, metadata=metadata, log=("[info] built",))

    def run(self, plan: Path, metadata: PlanMetadata) -> Any:
        assert sha256_file(plan) == metadata.plan_sha256
        return colour_engine(Path(metadata.variant) / f"{metadata.tower}.onnx", 1)


def finalized(
    path: Path, board: Board = LAPTOP, *, builder: Builder | None = None, options: FinalizeOptions = QUICK
) -> Receipt:
    builder = builder or Builder()
    tools = Tools(
        embedder=_embedder, portable=portable, native=builder.run, build=builder, root=Path("/nowhere")
    )
    with open_bundle(path) as bundle:
        return finalize(bundle, board=board, tools=tools, progress=QuietProgress(), options=options)
