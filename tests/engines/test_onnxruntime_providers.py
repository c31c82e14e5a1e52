"""A provider gets the options that it was given, and TensorRT's keeps what it built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeglm.core.errors import UserError
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine

TENSORRT, CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[tuple[str, dict[str, Any]]]]:
    """A stand-in for ONNX Runtime on a machine with a GPU: notes what each session is opened with."""
    opened: list[list[tuple[str, dict[str, Any]]]] = []

    def session(_path: str, _options: object, *, providers: list[Any]) -> SimpleNamespace:
        opened.append(providers)
        return SimpleNamespace(
            get_providers=lambda: [name for name, _ in providers],
            get_inputs=lambda: [],
            get_outputs=lambda: [],
        )

    runtime = SimpleNamespace(
        __version__="1.99.0",
        get_available_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"],
        SessionOptions=SimpleNamespace,
        GraphOptimizationLevel=SimpleNamespace(ORT_ENABLE_ALL=99),
        InferenceSession=session,
    )
    monkeypatch.setattr("edgeglm.engines.onnxruntime_engine._onnxruntime", lambda: runtime)
    monkeypatch.setenv("EDGEGLM_STORE", str(tmp_path / "store"))
    return opened


def model(path: Path, content: bytes = b"a model") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_options_reach_the_provider_that_they_were_given_for(sessions, tmp_path):
    given = (TENSORRT, {"trt_fp16_enable": True}), (CUDA, {"device_id": 1}), "CPUExecutionProvider"
    engine = OnnxRuntimeEngine(model(tmp_path / "m.onnx"), providers=given)
    engine.load()
    assert engine.providers == (TENSORRT, CUDA, "CPUExecutionProvider")
    assert sessions == [
        [(TENSORRT, {"trt_fp16_enable": True}), (CUDA, {"device_id": 1}), ("CPUExecutionProvider", {})]
    ]


def test_engines_of_two_models_with_one_name_are_kept_apart_and_found_again(sessions, tmp_path):
    one = model(tmp_path / "a" / "text.onnx")
    other = model(tmp_path / "b" / "text.onnx", b"the same graph, other weights")
    for path in (one, other, one):
        OnnxRuntimeEngine(path, providers=(TENSORRT,)).load()
    folders = []
    for [(name, options)] in sessions:
        assert (name, options["trt_engine_cache_enable"]) == (TENSORRT, True)
        folders.append(Path(options["trt_engine_cache_path"]))
        assert folders[-1].is_dir()
        assert tmp_path / "store" in folders[-1].parents
    assert folders[0] == folders[2] != folders[1]


def test_where_nothing_can_be_kept_the_provider_runs_all_the_same(sessions, tmp_path):
    (tmp_path / "store").write_bytes(b"in the way")
    OnnxRuntimeEngine(model(tmp_path / "m.onnx"), providers=(TENSORRT,)).load()
    assert sessions == [[(TENSORRT, {})]]


@pytest.mark.parametrize(
    ("providers", "words"),
    [
        ([3], "3 is no provider; give a name, or"),
        ([(CUDA, 3)], "is no provider; give a name, or"),
        ([(CUDA,)], "is no provider; give a name, or"),
        ([], "no ONNX Runtime provider is named; give one"),
    ],
)
def test_what_is_no_provider_is_refused(providers, words):
    with pytest.raises(UserError, match=words):
        OnnxRuntimeEngine(Path("m.onnx"), providers=providers)
