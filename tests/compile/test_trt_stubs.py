from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import loud_skip

pytest.importorskip("mypy")


def _errors(folder: Path, repository: Path, stub: str) -> str:
    """Return what mypy says of the agreement with a stub in place of the real one."""
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt/__init__.pyi").write_text(stub)
    (folder / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {repository}:{folder}\nexplicit_package_bases = true\n"
        "ignore_missing_imports = true\nfollow_imports = silent\ncache_dir = /dev/null\n"
    )
    agreement = repository / "tests/compile/trt_stubs_agree.py"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(folder / "mypy.ini"), str(agreement)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    return done.stdout


@pytest.mark.slow
def test_a_call_that_tensorrt_does_not_have_fails_the_type_check(tmp_path: Path, repository: Path):
    stub = (repository / "scripts/typing/tensorrt/__init__.pyi").read_text()
    (tmp_path / "whole").mkdir()
    assert "Success" in _errors(tmp_path / "whole", repository, stub)
    for number, (there, gone) in enumerate(
        [
            ("def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool)", "def other(self)"),
            ("engine_host_code_allowed: bool", "engine_host_code: bool"),
            ("def execute_async_v3(self, stream_handle: int)", "def execute_async_v3(self)"),
            ("    VERSION_COMPATIBLE: typing", "    VERSIONS_COMPATIBLE: typing"),
        ]
    ):
        assert there in stub
        folder = tmp_path / str(number)
        folder.mkdir()
        assert "error:" in _errors(folder, repository, stub.replace(there, gone)), gone


@pytest.mark.assets
def test_the_stub_is_what_the_published_one_says(repository: Path):
    done = subprocess.run(
        [sys.executable, str(repository / "scripts/typing/cut_tensorrt.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "pip" in done.stderr and "is not what the wheel gives" not in done.stderr:
        loud_skip(f"STUBS NOT FETCHED: {done.stderr.splitlines()[-1]}; the cut was not compared")
    assert done.returncode == 0, done.stderr
