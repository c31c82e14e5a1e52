"""A short run of every fuzzing target; tests/serve/fuzz_decoders.py says how to run one for longer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")
ROOT = Path(__file__).resolve().parent.parent.parent


OTHERS = ("text", "compressed", "message", "request")


@pytest.mark.parametrize(
    "target", ["image", "body", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_no_bytes_make_a_decoder_raise_what_the_server_would_answer_with_500(target: str, tmp_path: Path):
    command = [sys.executable, "-m", "tests.serve.fuzz_decoders", target, "-runs=1500", "-seed=7"]
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"Done \d+ runs", done.stderr), done.stderr[-4000:]
