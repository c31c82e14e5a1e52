"""Finalize, on a real bundle of two tiny towers: by ONNX Runtime for real, by a stand-in builder."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.receipt import finalized_folder, read_receipt, why_foreign
from edgeglm.bundle.trust import TRUST_VARIABLE
from edgeglm.bundle.verify import open_bundle
from edgeglm.cli import main as cli
from edgeglm.cli.finalize import _embedder
from edgeglm.compile.device_engines import build_signature
from edgeglm.compile.finalize import FinalizeOptions, Tools, finalize
from edgeglm.compile.owner import alone
from edgeglm.compile.timed import fastest
from edgeglm.compile.worker import BuildRequest
from edgeglm.core.errors import EdgeglmError, GateError, UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.engines.board import Board
from edgeglm.engines.libraries import broken
from edgeglm.runtime.finalized import choice_here
from tests.compile.stand_ins import LAPTOP, ORIN, QUICK, Builder, finalized, made, portable
from tests.engines.test_power import sensor


def test_the_receipt_of_a_board_with_sensors_says_what_timing_took(tmp_path: Path):
    tools = Tools(
        embedder=_embedder, portable=portable, native=Builder().run, root=sensor(tmp_path / "root", 500)
    )
    with open_bundle(made(tmp_path / "demo")) as bundle:
        receipt = finalize(bundle, board=LAPTOP, tools=tools, progress=QuietProgress(), options=QUICK)
    assert receipt.energy is not None
    assert receipt.energy.joules["VDD_GPU_SOC"] == pytest.approx(9.5 * receipt.energy.seconds, abs=0.01)
    assert receipt.before.rails_mw == {"VDD_GPU_SOC": 9500.0}
    assert finalized(made(tmp_path / "other")).energy is None, "no sensor is not no energy"
    assert read_receipt(finalized_folder(tmp_path / "demo")) == receipt


@pytest.fixture
def choice() -> Callable[[Path, Board], Any]:
    def chosen(path: Path, board: Board, variant: str | None = None) -> Any:
        with open_bundle(path) as bundle:
            return choice_here(bundle, variant, board=lambda: board)

    return chosen


def test_a_laptop_gets_the_fastest_variant_that_answers_as_at_home(tmp_path: Path):
    receipt = finalized(made(tmp_path / "demo"))
    assert {record.variant: record.status for record in receipt.candidates}[receipt.chosen] == "chosen"
    assert {record.status for record in receipt.candidates} == {"chosen", "passed"}
    for record in receipt.candidates:
        assert record.latency_ms.keys() == {"image_b1_ms", "text_b1_ms"}
        assert record.selftest is not None
        assert (record.selftest.images, record.selftest.texts) == (2, 2)
    assert (receipt.library, receipt.evidence, receipt.member) == ("onnxruntime", "ONNX Runtime", "cpu")
    assert read_receipt(finalized_folder(tmp_path / "demo")) == receipt


def test_a_variant_that_answers_otherwise_here_is_never_chosen_however_fast(tmp_path: Path):
    receipt = finalized(made(tmp_path / "demo", int8_text=-1.0))
    assert receipt.chosen == "fp32"
    failed = receipt.candidate("int8")
    assert failed.status == "failed"
    assert "worst cosine 1.0000 over pictures and -1.0000 over texts" in failed.reason
    assert failed.latency_ms == {}


def test_no_receipt_is_written_when_nothing_answers_as_at_home(tmp_path: Path):
    path = made(tmp_path / "demo")
    with pytest.raises(GateError, match="no variant of colours answers here"):
        finalized(path, options=FinalizeOptions(rounds=7, cosine=1.5))
    assert read_receipt(finalized_folder(path)) is None


def test_a_difference_within_the_noise_leaves_the_bundles_default(tmp_path: Path):
    with open_bundle(made(tmp_path / "demo")) as bundle:
        assert fastest(bundle, {"int8": {"a": 9.8}, "fp32": {"a": 10.0}}) == "fp32"
        assert fastest(bundle, {"int8": {"a": 9.0}, "fp32": {"a": 10.0}}) == "int8"


def test_variants_that_share_a_file_share_its_engine(tmp_path: Path):
    builder = Builder()
    finalized(made(tmp_path / "demo", "jetson-agx-orin-64gb"), ORIN, builder=builder)
    (request, *_) = builder.requests
    other = msgspec.structs.replace(request, variant="fp16", precision="fp16")

    def signature(wanted: BuildRequest, version: str = "10.3.0") -> str:
        return build_signature(wanted, onnx_sha256="0" * 64, board=ORIN, version=version)

    assert signature(request) == signature(other)
    assert signature(request, "10.4.0") != signature(request)


def test_run_follows_the_receipt_and_names_it(tmp_path: Path, choice):
    path = made(tmp_path / "demo", int8_text=-1.0)
    assert choice(path, LAPTOP).words == "ONNX Runtime"
    receipt = finalized(path)
    here = choice(path, LAPTOP)
    assert (here.variant, here.receipt) == ("fp32", receipt)
    assert here.words == f"onnxruntime 1.24.4, chosen by the receipt of {receipt.created}"
    asked = choice(path, LAPTOP, "int8")
    assert asked.variant == "int8"
    assert "as asked; the receipt of this board chose fp32" in asked.words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "Other CPU"}, "made on another board (Some CPU, x86_64)"),
        ({"libraries": {"onnxruntime": "1.30"}}, "made with onnxruntime 1.24.4, here is 1.30"),
    ],
)
def test_a_receipt_that_came_with_a_copied_folder_is_not_believed(change, words, tmp_path: Path, choice):
    path = made(tmp_path / "demo")
    finalized(path)
    here = choice(path, msgspec.structs.replace(LAPTOP, **change))
    assert here.receipt is None
    assert words in here.words


def test_a_link_to_a_bundle_serves_what_was_finalized_under_its_name(tmp_path: Path, choice):
    for name in ("fruit-1", "fruit-2"):
        finalized(made(tmp_path / name, "jetson-agx-orin-64gb"), ORIN)
    (tmp_path / "current").symlink_to("fruit-1")
    assert choice(tmp_path / "current", ORIN).receipt == read_receipt(finalized_folder(tmp_path / "fruit-1"))
    assert finalized(tmp_path / "current", ORIN).candidate("int8").engines["text"].reused
    assert not (tmp_path / "current.finalized").exists(), "or the receipt of one would hide that of the next"
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("fruit-2")
    assert choice(tmp_path / "current", ORIN).receipt == read_receipt(finalized_folder(tmp_path / "fruit-2"))


def test_a_link_to_a_bundle_that_nobody_can_write_may_have_a_receipt_of_its_own(tmp_path: Path, choice):
    medium = made(tmp_path / "medium" / "demo")
    (tmp_path / "demo").symlink_to(medium)
    (tmp_path / "demo.finalized").mkdir()
    receipt = finalized(tmp_path / "demo")
    assert choice(tmp_path / "demo", LAPTOP).receipt == receipt
    assert not finalized_folder(medium).exists()


def test_a_receipt_that_this_user_may_not_read_is_not_called_broken(tmp_path: Path, choice, monkeypatch):
    path = made(tmp_path / "demo")
    finalized(path)
    read = Path.read_bytes

    def refused(self: Path) -> bytes:
        if self.name == "receipt.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refused)  # the tests may be run by root, who reads all
    with pytest.raises(UserError, match=r"cannot read .*receipt.json: Permission denied; let this user"):
        choice(path, LAPTOP)


def test_a_receipt_of_the_bundle_that_was_there_before_is_not_believed(tmp_path: Path):
    path = made(tmp_path / "demo")
    receipt = finalized(path)
    made(path, int8_text=0.5)
    with open_bundle(path) as bundle:
        assert why_foreign(receipt, bundle, LAPTOP) == "it was made for another content of the bundle"


def test_a_board_builds_each_gated_candidate_and_runs_it(tmp_path: Path, choice):
    path, builder = made(tmp_path / "demo", "jetson-agx-orin-64gb"), Builder()
    receipt = finalized(path, ORIN, builder=builder)
    assert [(r.variant, r.tower, r.precision) for r in builder.requests] == [
        ("int8", "image", "int8"),
        ("int8", "text", "int8"),
    ]
    assert (receipt.chosen, receipt.library, receipt.evidence) == ("int8", "tensorrt", "real device")
    assert (receipt.member, receipt.lane) == ("jetson-agx-orin-64gb", "B")
    assert receipt.candidate("fp32").status == "left out"
    assert "it is the reference" in receipt.candidate("fp32").reason
    folder = finalized_folder(path) / "engines"
    assert {use.signature for use in receipt.candidate("int8").engines.values()} == {
        place.name for place in folder.iterdir()
    }
    here = choice(path, ORIN)
    assert here.words.startswith("tensorrt 10.3.0, chosen by the receipt")
    engine = here.engine(path / "models/int8/text.onnx", 1)
    assert engine.path.read_bytes() == b"plan of int8 text"


def test_engines_are_reused_until_something_that_decides_them_changes(tmp_path: Path):
    path, builder = made(tmp_path / "demo", "jetson-agx-orin-64gb"), Builder()
    first = finalized(path, ORIN, builder=builder)
    again = finalized(path, ORIN, builder=builder)
    assert len(builder.requests) == 2
    assert all(use.reused for use in again.candidate("int8").engines.values())
    assert not any(use.reused for use in first.candidate("int8").engines.values())
    finalized(path, msgspec.structs.replace(ORIN, l4t="36.5"), builder=builder)
    assert len(builder.requests) == 4
    assert len(list((finalized_folder(path) / "engines").iterdir())) == 2, "the old ones are swept"


def test_engines_are_on_the_disk_before_the_receipt_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or a board that loses power after its finalize has a receipt, and a server that opens empty plans."""
    synced: list[str] = []
    sync = os.fsync

    def recorded(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    path = made(tmp_path / "demo", "jetson-agx-orin-64gb")
    monkeypatch.setattr(os, "fsync", recorded)
    finalized(path, ORIN)
    before = synced[: next(at for at, name in enumerate(synced) if name.startswith(".receipt.json"))]
    assert before.count("engine.plan") == before.count("engine.json") == 2


def test_an_engine_that_rotted_on_the_disk_is_built_again(tmp_path: Path):
    path, builder = made(tmp_path / "demo", "jetson-agx-orin-64gb"), Builder()
    receipt = finalized(path, ORIN, builder=builder)
    use = receipt.candidate("int8").engines["text"]
    plan = finalized_folder(path) / "engines" / use.signature / "engine.plan"
    plan.write_bytes(b"plan of int8 texu")
    assert finalized(path, ORIN, builder=builder).chosen == "int8"
    assert [request.tower for request in builder.requests] == ["image", "text", "text"]
    assert plan.read_bytes() == b"plan of int8 text"


def test_a_candidate_that_cannot_be_built_leaves_the_others(tmp_path: Path):
    path = made(tmp_path / "demo", "jetson-agx-orin-64gb")
    with pytest.raises(EdgeglmError, match=r"could be built or run here .*node 'odd'") as caught:
        finalized(path, ORIN, builder=Builder(fails="int8"))
    assert not isinstance(caught.value, GateError), "nothing was measured against a gate"


@pytest.mark.parametrize("left", [0, 4096])
def test_a_full_disk_ends_it_at_once_and_names_the_place(left: int, tmp_path: Path, small_disk: Path, capsys):
    path = made(tmp_path / "demo")
    (small_disk / "fill").write_bytes(bytes(96 * 1024 - left))
    assert cli.exit_code(["finalize", str(path), "--rounds", "7"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write {small_disk}/"), said
    assert "No space left on device" in said
    assert said.rstrip().endswith("free some space or choose another disk")
    assert sorted(path.name for path in small_disk.iterdir()) == [".lock", "fill"]


def test_a_tensorrt_that_broke_since_the_engines_were_built_ends_it_with_the_remedy(tmp_path: Path):
    path, builder = made(tmp_path / "demo", "jetson-agx-orin-64gb"), Builder()
    finalized(path, ORIN, builder=builder)

    def fails(plan: Path, metadata: object) -> None:
        raise broken("tensorrt", ImportError("libnvinfer.so.10: cannot open"), "finalize with ONNX Runtime")

    tools = Tools(embedder=_embedder, portable=portable, native=fails, build=builder, root=tmp_path)  # type: ignore[arg-type]
    with open_bundle(path) as bundle, pytest.raises(UserError, match=r"broken: libnvinfer\.so\.10"):
        finalize(bundle, board=ORIN, tools=tools, progress=QuietProgress(), options=QUICK)


def test_a_disk_that_an_engine_fills_ends_it_and_no_other_candidate_is_tried(
    tmp_path: Path, small_disk: Path
):
    path, builder = made(tmp_path / "demo", "jetson-agx-orin-64gb"), Builder()
    (small_disk / "fill").write_bytes(bytes(92 * 1024))
    with pytest.raises(UserError, match=rf"cannot write {small_disk}/engines/\w+: No space left"):
        finalized(path, ORIN, builder=builder)
    assert len(builder.requests) == 1
    (small_disk / "fill").unlink()
    assert finalized(path, ORIN, builder=builder).chosen == "int8"


def test_a_second_finalize_is_refused_with_the_number_of_the_first(tmp_path: Path):
    path = made(tmp_path / "demo")
    with (
        alone(finalized_folder(path)),
        pytest.raises(UserError, match=f"at work .process {os.getpid()}, since"),
    ):
        finalized(path)
    assert finalized(path).chosen


def _hold_and_die(folder: Path) -> None:
    with alone(folder):
        os._exit(9)


def test_a_finalize_that_was_killed_locks_nobody_out(tmp_path: Path):
    path = made(tmp_path / "demo")
    killed = multiprocessing.get_context("spawn").Process(
        target=_hold_and_die, args=(finalized_folder(path),)
    )
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    assert finalized(path).chosen


def test_a_bundle_that_was_not_verified_is_not_finalized(tmp_path: Path):
    path = made(tmp_path / "demo")
    tools = Tools(embedder=_embedder, portable=portable, native=Builder().run)
    with open_bundle(path, verify=False) as bundle, pytest.raises(UserError, match="not verified"):
        finalize(bundle, board=LAPTOP, tools=tools, progress=QuietProgress())


def test_keys_that_are_mounted_read_only_end_it_before_an_engine_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """As in a container: it ended with 2 and 'nothing was changed' after all had been built and chosen."""
    pytest.importorskip("cryptography")
    path = made(tmp_path / "demo")
    assert cli.exit_code(["keygen", "maker", "--folder", str(tmp_path / "keys")]) == 0
    assert cli.exit_code(["sign", str(path), "--key", str(tmp_path / "keys/maker.key")]) == 0
    monkeypatch.setenv(TRUST_VARIABLE, str(tmp_path / "keys"))
    allowed = os.access

    def refused(place: object, mode: int) -> bool:  # the tests may be run by root, who may do all
        return Path(str(place)).name != "keys" and allowed(str(place), mode)

    monkeypatch.setattr("os.access", refused)
    assert cli.exit_code(["finalize", str(path), "--rounds", "7"]) == 2
    assert "make it writable, or pass --allow-downgrade" in capsys.readouterr().err
    assert not finalized_folder(path).exists()
    assert cli.exit_code(["finalize", str(path), "--rounds", "7", "--allow-downgrade"]) == 0
    assert read_receipt(finalized_folder(path)) is not None
    assert not (tmp_path / "keys/seen.json").exists()


def test_a_broken_receipt_is_said_and_not_worked_around(tmp_path: Path, choice):
    path = made(tmp_path / "demo")
    finalized(path)
    receipt = finalized_folder(path) / "receipt.json"
    receipt.write_bytes(receipt.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"is no receipt: .* run 'edgeglm finalize' again"):
        choice(path, LAPTOP)


def test_the_command_makes_an_archive_ready_too(tmp_path: Path, capsys):
    from edgeglm.bundle.archive import archive_from_folder

    folder = made(tmp_path / "demo")
    with open_bundle(folder) as bundle:
        archive_from_folder(folder, bundle.manifest.files, tmp_path / "demo.zip", "zip")
    code = cli.exit_code(["finalize", str(tmp_path / "demo.zip"), "--rounds", "7", "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    receipt = json.loads(captured.out)
    assert receipt["receipt"] == str(tmp_path / "demo.zip.finalized" / "receipt.json")
    assert cli.exit_code(["run", str(tmp_path / "demo.zip"), "--query", "red"]) == 0
    assert "chosen by the receipt of" in capsys.readouterr().out


def test_a_bundle_stays_verifiable_after_it_was_finalized(tmp_path: Path):
    path = made(tmp_path / "demo")
    finalized(path)
    opened: Bundle = open_bundle(path)
    assert opened.verified
