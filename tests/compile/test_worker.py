"""A builder that prints, crashes or is interrupted must not take the build down with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX builds on x86-64 hosts only")

from edgeglm.compile.worker import BuildRequest, engine_built_apart
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import QuietProgress, Task
from edgeglm.engines.plan import ShapeRange
from edgeglm.targets.schema import load_target

Tower = Callable[..., Path]
IMAGES = {"pixels": ShapeRange(min=(1, -1, -1, -1), opt=(4, -1, -1, -1), max=(8, -1, -1, -1))}


def request_for(path: Path, precision: str = "fp16") -> BuildRequest:
    return BuildRequest(
        onnx_path=str(path),
        targets=(load_target("t4"),),
        library="tensorrt-rtx",
        precision=precision,
        profiles=(IMAGES,),
        variant="fp16",
        tower="image",
    )


@pytest.fixture
def half(tmp_path: Path, image_tower: Tower) -> Path:
    return image_tower(tmp_path / "image.onnx")


def test_an_engine_comes_back_whole_and_nothing_is_printed(
    half: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = engine_built_apart(request_for(half), QuietProgress())
    assert sha256_bytes(engine.plan) == engine.metadata.plan_sha256
    assert engine.log
    assert capfd.readouterr() == ("", "")


def test_what_the_builder_prints_goes_into_the_log(
    tmp_path: Path, image_tower: Tower, capfd: pytest.CaptureFixture[str]
) -> None:
    """Myelin writes its own warnings to stdout, past the logger; ``--json`` would not survive that."""
    noisy = image_tower(tmp_path / "noisy.onnx", clip=True)
    engine = engine_built_apart(request_for(noisy), QuietProgress())
    assert any(line.startswith("[builder] WARNING") for line in engine.log)
    assert capfd.readouterr() == ("", "")


def test_refusals_keep_their_kind_and_words(tmp_path: Path, image_tower: Tower) -> None:
    full = image_tower(tmp_path / "full.onnx", half=False)
    with pytest.raises(UserError, match="use fp16"):
        engine_built_apart(request_for(full, "fp32"), QuietProgress())
    with pytest.raises(EdgeglmError, match=r"proj.*FP32 GEMM is not supported") as caught:
        engine_built_apart(request_for(full), QuietProgress())
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -SEGV $$", "died \\(SIGSEGV\\) on fp16 image.onnx"),
        ("echo 'out of memory' >&2; exit 7", "died \\(exit 7\\) on fp16 image.onnx: out of memory"),
    ],
)
def test_a_builder_that_crashes_is_an_error_with_its_last_words(
    half: Path, script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text(f"#!/bin/sh\n{script}\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(EdgeglmError, match=message):
        engine_built_apart(request_for(half), QuietProgress())


def test_a_disk_too_full_for_an_engine_is_the_users_and_named(
    half: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    (small_disk / "fill").write_bytes(bytes(88 * 1024))
    with pytest.raises(UserError, match=rf"cannot write {small_disk}/\S+: No space left.*free some space"):
        engine_built_apart(request_for(half), QuietProgress())
    assert [path.name for path in small_disk.iterdir()] == ["fill"]


class Interrupted:
    """A progress at which somebody presses Ctrl-C."""

    def advance(self, steps: float = 1) -> None:
        raise KeyboardInterrupt

    def note(self, text: str) -> None:
        raise KeyboardInterrupt

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        yield self


def test_ctrl_c_stops_the_child_and_is_passed_on(half: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        engine_built_apart(request_for(half), Interrupted())


def test_a_builder_does_not_outlive_a_killed_finalize(half: Path, tmp_path: Path) -> None:
    """It would hold the memory and the GPU that the next finalize measures on."""
    begun = tmp_path / "begun"
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'edgeglm.compile.worker' in ' '.join(sys.orig_argv):\n"
        "    import time\n"
        "    from edgeglm.compile import builder\n"
        "    def slow(*_, **__):\n"
        f"        open({str(begun)!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"        os.rename({str(begun)!r} + '.new', {str(begun)!r})\n"
        "        time.sleep(60)\n"
        "    builder.engine_from_onnx = slow\n"
    )
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.compile.test_worker import request_for, engine_built_apart, QuietProgress\n"
        "engine_built_apart(request_for(Path(sys.argv[1])), QuietProgress())"
    )
    path = os.pathsep.join(filter(None, sys.path))
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(half), str(tmp_path / "shim")],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
    )
    try:
        assert _within(30, begun.exists)
    finally:
        parent.kill()
        parent.wait()
    child = Path("/proc") / begun.read_text()
    assert _within(5, lambda: not child.exists() or ") Z " in (child / "stat").read_text())


def _within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()
