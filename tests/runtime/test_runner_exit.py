"""How a process ends whose engine is in native code: with its own exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

from scripts.fixtures.graphs import graph_model

_ENDS = """
import atexit, sys
import numpy as np
from pathlib import Path
from edgeglm.engines.onnxruntime_engine import OnnxRuntimeEngine
from edgeglm.runtime import RequestError, RunnerConfig, SyncRunner, TowerSource
from edgeglm.runtime import worker

worker._LAST_WAIT = 0.3
towers = {"x": TowerSource(engine=lambda: OnnxRuntimeEngine(Path(sys.argv[1]), threads=1))}
config = RunnerConfig(warm_up=False, hang_after=float(sys.argv[2]), drain_timeout=0.1)
runner = SyncRunner(towers, config).__enter__()
try:
    runner.infer("x", {"x": np.ones((64, 64), np.float32)}, deadline=1.0)
except RequestError as error:
    print(type(error).__name__)
if sys.argv[3] == "closed":
    runner.__exit__(None, None, None)
sys.exit(3)
"""


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose calls take hours."""
    flag, step = helper.make_tensor_value_info, helper.make_node
    body = helper.make_graph(
        [
            step("MatMul", ["carried", "carried"], ["squared"]),
            step("Tanh", ["squared"], ["next"]),
            step("Identity", ["going"], ["goes"]),
        ],
        "body",
        [
            flag("turn", TensorProto.INT64, []),
            flag("going", TensorProto.BOOL, []),
            flag("carried", TensorProto.FLOAT, None),
        ],
        [flag("goes", TensorProto.BOOL, []), flag("next", TensorProto.FLOAT, None)],
    )
    model = graph_model(
        [step("Loop", ["turns", "", "x"], ["y"], body=body)], {"turns": 2**40}, shape=("B", 64, 64)
    )
    path = tmp_path_factory.mktemp("endless") / "endless.onnx"
    save(model, path)
    return path


@pytest.mark.parametrize(
    ("hang_after", "left", "told"),
    [
        (0.3, "closed", "EngineFailedError"),
        (0.3, "open", "EngineFailedError"),
        (60, "open", "DeadlineExceededError"),
    ],
)
def test_a_call_that_onnxruntime_is_still_in_does_not_abort_the_process(
    repository: Path, endless: Path, hang_after: float, left: str, told: str
):
    result = subprocess.run(
        [sys.executable, "-c", _ENDS, str(endless), str(hang_after), left],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (3, f"{told}\n"), result.stderr
