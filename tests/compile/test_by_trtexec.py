"""Finalize by trtexec from Python: the board's files and its trtexec are stand-ins, the shell is real."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest

from edgeglm.bundle.archive import ArchiveKind
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.receipt import finalized_folder
from edgeglm.bundle.verify import open_bundle
from edgeglm.compile import by_trtexec
from edgeglm.compile.by_trtexec import RECEIPT_NAME, finalize_by_trtexec, needs_trtexec
from edgeglm.compile.owner import alone
from edgeglm.core.errors import EdgeglmError, GateError, UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.engines.board import board_from_files
from tests.compile.shell_board import ORIN, XAVIER, board, with_shell
from tests.compile.stand_ins import made

QUIET = QuietProgress()


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of an Orin whose trtexec is a stand-in that answers for the bundle ``demo``."""
    for name, value in (
        ("CALLS", tmp_path / "calls"),
        ("BUNDLE", tmp_path / "demo"),
        ("FAILS", ""),
        ("WRONG", ""),
    ):
        monkeypatch.setenv(f"STUB_{name}", str(value))
    return board(tmp_path / "root", ORIN)


def test_a_board_whose_python_sees_no_tensorrt_gets_its_engines_by_trtexec(tmp_path: Path, stub: Path):
    with open_bundle(with_shell(tmp_path)) as bundle:
        here = msgspec.structs.replace(board_from_files(stub), memory_bytes=64 << 30)
        assert needs_trtexec(bundle, here)
        receipt = finalize_by_trtexec(bundle, progress=QUIET, root=stub)
        assert (receipt.chosen, receipt.lane, receipt.library_version) == ("int8", "B", "10.3.0")
        assert [c.status for c in receipt.candidates] == ["passed", "passed"]
        assert (finalized_folder(bundle.origin) / RECEIPT_NAME).is_file()
        bound = msgspec.structs.replace(here, libraries={"tensorrt": "10.3.0"})
        assert not needs_trtexec(bundle, bound), "the binding is there"
        assert not needs_trtexec(bundle, board_from_files(tmp_path)), "no board, no trtexec"


@pytest.mark.parametrize("kind", ["zip", "tar.zst"])
def test_an_archive_is_built_from_and_its_receipt_lies_beside_it(
    kind: ArchiveKind, tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
):
    with open_bundle(with_shell(tmp_path)) as bundle:
        names = [name for name in bundle.manifest.files if name != "bom.cdx.json"]
        sources: dict[str, Path | bytes] = {name: bundle.file(name) for name in names}
        write_bundle(tmp_path / "packed", sources=sources, manifest=bundle.manifest, archive=kind)
        archive = tmp_path / f"packed.{kind}"
    assert archive.is_file()
    with open_bundle(archive) as bundle:
        monkeypatch.setenv("STUB_BUNDLE", str(bundle.path))
        receipt = finalize_by_trtexec(bundle, progress=QUIET, root=stub)
    assert receipt.chosen == "int8"
    place = finalized_folder(archive)
    assert (place / RECEIPT_NAME).is_file()
    assert len(list(place.glob("engines/*/engine.plan"))) == 4
    with open_bundle(archive) as bundle:  # unpacked elsewhere, and the engines are the same
        (tmp_path / "calls").unlink()
        monkeypatch.setenv("STUB_BUNDLE", str(bundle.path))
        finalize_by_trtexec(bundle, progress=QUIET, root=stub)
    assert "--saveEngine" not in (tmp_path / "calls").read_text()


def test_edgeglms_own_finalize_keeps_it_waiting(tmp_path: Path, stub: Path):
    with (
        open_bundle(with_shell(tmp_path)) as bundle,
        alone(finalized_folder(bundle.origin)),
        pytest.raises(UserError, match="another finalize is at work"),
    ):
        finalize_by_trtexec(bundle, progress=QUIET, root=stub)


def test_the_script_of_the_bundle_is_never_run(tmp_path: Path, stub: Path):
    folder = with_shell(tmp_path)
    evil = b"#!/bin/sh\ntouch " + str(tmp_path / "pwned").encode() + b"\n"
    with open_bundle(folder) as bundle:
        sources: dict[str, Path | bytes] = {n: bundle.file(n) for n in bundle.manifest.files}
        del sources["bom.cdx.json"]
        write_bundle(
            tmp_path / "evil" / "demo", sources={**sources, "finalize.sh": evil}, manifest=bundle.manifest
        )
    with open_bundle(tmp_path / "evil" / "demo") as bundle:
        assert finalize_by_trtexec(bundle, progress=QUIET, root=stub).chosen == "int8"
    assert not (tmp_path / "pwned").exists()


def test_a_bundle_of_another_edgeglm_without_these_files_is_finalized_too(tmp_path: Path, stub: Path):
    with open_bundle(with_shell(tmp_path)) as bundle:
        bare: dict[str, Path | bytes] = {
            name: bundle.file(name)
            for name in bundle.manifest.files
            if name not in ("bom.cdx.json", "finalize.sh") and not name.endswith(".near")
        }
        write_bundle(tmp_path / "old" / "demo", sources=bare, manifest=bundle.manifest)
    with open_bundle(tmp_path / "old" / "demo") as bundle:
        receipt = finalize_by_trtexec(bundle, progress=QUIET, root=stub)
    assert receipt.chosen == "int8"
    assert receipt.candidates[0].towers["text"].top_k_agreement == 1.0


def test_a_foreign_board_and_wrong_answers_are_what_the_script_says_of_them(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
):
    with open_bundle(with_shell(tmp_path, target="jetson-agx-orin-64gb")) as bundle:
        with pytest.raises(UserError, match=r"^this is A tegra194 board \(SM 72\).*pass --any-board"):
            finalize_by_trtexec(bundle, progress=QUIET, root=board(tmp_path / "other", XAVIER))
        monkeypatch.setenv("STUB_FAILS", ".onnx")
        with pytest.raises(EdgeglmError, match=r"^trtexec built or ran no candidate; mend what .*last\.log"):
            finalize_by_trtexec(bundle, progress=QUIET, root=stub)
        monkeypatch.setenv("STUB_FAILS", "fp16")
        monkeypatch.setenv("STUB_WRONG", "int8")
        with pytest.raises(GateError, match="no candidate answers here"):
            finalize_by_trtexec(bundle, progress=QUIET, root=stub)
        assert not (finalized_folder(bundle.origin) / RECEIPT_NAME).exists()


@pytest.mark.parametrize("name", ["x\nEND\ntouch pwned", "../../x", "a b", "$(touch pwned)"])
def test_a_name_that_could_end_or_leave_the_script_is_refused(name: str, tmp_path: Path, stub: Path):
    with open_bundle(with_shell(tmp_path)) as bundle:
        (first, *rest) = bundle.manifest.variants
        odd = msgspec.structs.replace(first, name=name, gate="passed")
        manifest = msgspec.structs.replace(bundle.manifest, variants=(odd, *rest))
        object.__setattr__(bundle, "manifest", manifest)
        with pytest.raises(UserError, match="cannot stand in a shell script"):
            finalize_by_trtexec(bundle, progress=QUIET, root=stub)


def test_a_target_without_a_jetson_is_refused_with_the_option_that_asked(tmp_path: Path):
    with (
        open_bundle(made(tmp_path / "demo", "cpu")) as bundle,
        pytest.raises(UserError, match="cpu has none among its members; leave --engine out"),
    ):
        finalize_by_trtexec(bundle, progress=QuietProgress())


def test_what_a_killed_finalize_leaves_at_work_keeps_the_next_one_waiting(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
):
    """The script starts something that outlives it, as ``trtexec`` outlives a killed edgeglm."""
    bundle = with_shell(tmp_path)
    place = finalized_folder(bundle)
    script = f"sleep 60 >/dev/null 2>&1 & echo $! >{tmp_path}/left; exit 2"
    run = by_trtexec._run
    monkeypatch.setattr(
        by_trtexec, "_run", lambda _, *rest, **named: run(["sh", "-c", script], *rest, **named)
    )
    monkeypatch.setattr(
        by_trtexec, "_stopped", lambda child: child.stdout.close()
    )  # nobody is there to stop it
    with open_bundle(bundle) as opened, pytest.raises(UserError):
        finalize_by_trtexec(opened, progress=QUIET, root=stub)
    left = int((tmp_path / "left").read_text())
    try:
        with pytest.raises(UserError, match="another finalize is at work"), alone(place):
            pass
    finally:
        os.kill(left, signal.SIGKILL)
