"""The doctor must find what would break a build, and say what to do about it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from edgeglm.engines import environment
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.environment import (
    cpu_finding,
    cpu_flags,
    disk_finding,
    doctor_findings,
    npm_finding,
    onnxruntime_findings,
    python_finding,
    tensorrt_findings,
)

Usage = namedtuple("Usage", "total used free")


def test_this_machine_gets_a_full_report_without_an_error(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    findings = doctor_findings(store_root=tmp_path / "not" / "yet")
    assert {
        "Python",
        "ONNX Runtime",
        "provider",
        "TensorRT",
        "TensorRT-RTX",
        "npm",
        "disk",
        "GPU",
        "CPU",
    } <= {finding.subject for finding in findings}
    assert [f for f in findings if f.subject == "provider" and f.text == "CPU computes" and f.level == "ok"]
    assert not [finding for finding in findings if finding.level == "error" and finding.subject != "disk"]


def test_a_provider_without_its_libraries_is_not_reported_as_working() -> None:
    pytest.importorskip("onnxruntime")
    if cuda_devices():
        pytest.skip("this machine has a GPU")
    texts = [finding.text for finding in onnxruntime_findings() if finding.text.startswith("CUDA")]
    assert all("does not work" in text for text in texts)


def test_both_onnxruntime_distributions_at_once_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_version", lambda _: "1.24")
    (finding,) = onnxruntime_findings()
    assert finding.level == "error"
    assert "pip uninstall" in finding.text


def test_a_crashing_onnxruntime_is_an_error_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object, **options: object) -> None:
        raise subprocess.CalledProcessError(-11, "python")

    monkeypatch.setattr(subprocess, "run", crash)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    (finding,) = onnxruntime_findings()
    assert finding.level == "error"
    assert "install it again" in finding.text


@pytest.mark.parametrize(("version", "level"), [((3, 9), "error"), ((3, 10), "warn"), ((3, 12), "ok")])
def test_the_python_version_decides_what_can_be_done(version: tuple[int, int], level: str) -> None:
    assert python_finding(version).level == level


@pytest.mark.parametrize(("free", "level"), [(1 << 20, "error"), (3 << 30, "warn"), (99 << 30, "ok")])
def test_a_nearly_full_disk_is_reported_before_a_build_fails(
    free: int, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 << 30, 0, free))
    finding = disk_finding(tmp_path / "store")
    assert finding.level == level
    assert (level == "ok") != ("EDGEGLM_STORE" in finding.text)


def test_a_machine_without_npm_or_tensorrt_is_told_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(environment, "_version", lambda _: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert npm_finding().level == "warn"
    assert [finding.level for finding in tensorrt_findings()] == ["ok", "warn"]
    assert onnxruntime_findings()[0].level == "error"


def test_the_flags_of_both_architectures_are_understood(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    assert cpu_finding(cpu_flags(tmp_path / "x86"), "x86_64").level == "ok"
    assert cpu_finding(cpu_flags(tmp_path / "arm"), "aarch64").level == "ok"
    assert cpu_finding(cpu_flags(tmp_path / "none"), "riscv64").level == "warn"
