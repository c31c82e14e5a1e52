from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeglm.bundle.goldens import golden_sources
from edgeglm.bundle.manifest import (
    LeftOutRecord,
    LicenceRecord,
    Manifest,
    StageRecord,
    TargetRecord,
    TensorRecord,
    TowerRecord,
    VariantRecord,
)
from edgeglm.bundle.pack import write_bundle

DIMENSION = 4
ROWS = 12


def unit_rows(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extracted archives go where a test can see whether any was left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power; the writers in other processes do sync."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def manifest() -> Manifest:
    tower = TowerRecord(
        inputs=(TensorRecord(name="pixels", dtype="float32", shape=("batch", 3, 8, 8)),),
        outputs=(TensorRecord(name="embedding", dtype="float32", shape=("batch", DIMENSION)),),
        embedding_dim=DIMENSION,
        parameters=1234,
        resolution=8,
    )
    variants = tuple(
        VariantRecord(
            name=name,
            files={t: f"models/{name}/{t}.onnx" for t in ("image", "text")},
            gate="reference" if name == "fp32" else "passed",
            metrics={"unseen": {"map10": {"value": 0.5}}},
            latency={"image_b1_ms": 1.5},
        )
        for name in ("fp32", "int8")
    )
    return Manifest(
        name="demo",
        created="2026-11-23T12:00:00+00:00",
        edgeglm="0.1.0",
        target=TargetRecord(name="cpu", facts={"kind": "cpu", "compute_capabilities": ["7.2", "8.7"]}),
        default_variant="int8",
        variants=variants,
        left_out=(
            LeftOutRecord(
                name="fp16", reason="mAP@10 0.2 of 0.5", metrics={"unseen": {"map10": {"value": 0.2}}}
            ),
        ),
        towers={"image": tower, "text": tower},
        stages=(StageRecord(name="teacher", config={"rank": 8}, inputs={}, artifact="a" * 64, seconds=1.0),),
        licences=(LicenceRecord(name="noto", version="1.2.9", licence="Apache-2.0", attribution="Google"),),
        seeds={"recipe": 0},
    )


@pytest.fixture
def sources() -> dict[str, Path | bytes]:
    items = [
        {"id": f"noto/{i}", "text": f"picture {i}", "thumbnail": f"thumbnails/{i}.png"} for i in range(ROWS)
    ]
    return {
        **{
            f"models/{v}/{t}.onnx": f"{v} {t}".encode() * 50
            for v in ("fp32", "int8")
            for t in ("image", "text")
        },
        "tokenizer/tokenizer.json": b"{}",
        "preprocessing.json": json.dumps({"image": {"resolution": 8}, "text": {"max_length": 5}}).encode(),
        "calibration.json": b"{}",
        "recipe.toml": b'name = "default"\n',
        "target.toml": b'name = "cpu"\n',
        "metrics.json": b"{}",
        "report.html": b"<html></html>",
        "gallery/items.jsonl": "\n".join(map(json.dumps, items)).encode(),
        "gallery/embeddings-fp32.npy": npy(unit_rows(ROWS, 1)),
        "gallery/embeddings-int8.npy": npy(unit_rows(ROWS, 2)),
        "gallery/thumbnails/3.png": b"png",
        **golden_sources(
            [b"png one", b"png two"],
            ["red apple", "dog", "sun"],
            {"image": unit_rows(2, 3), "text": unit_rows(3, 4), "text-int8": unit_rows(3, 5)},
        ),
    }


@pytest.fixture
def packed(tmp_path: Path, manifest: Manifest, sources: dict[str, Path | bytes]) -> Path:
    return write_bundle(tmp_path / "demo.bundle", sources=sources, manifest=manifest)


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Read a folder whole, to see that nothing in it changed."""

    def read(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return read
