"""Which board a bundle is finalized for, by whom, and whether it has the room."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from edgeglm.bundle.receipt import finalized_folder
from edgeglm.bundle.verify import open_bundle
from edgeglm.cli.finalize import _embedder
from edgeglm.compile.finalize import FinalizeOptions, Tools, finalize
from edgeglm.compile.route import member_for
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.engines.board import Board
from edgeglm.targets.schema import load_target, resolve_target
from tests.compile.stand_ins import LAPTOP, NANO, ORIN, QUICK, THOR, Builder, finalized, made, portable


@pytest.mark.parametrize(
    ("target", "board", "words"),
    [
        ("jetson-agx-orin-64gb", THOR, r"this board is outside target .*SM 11\.0.*pass --any-board"),
        ("jetson-agx-orin-64gb", NANO, r"with 7\.8 GB; jetson-agx-orin-64gb counts on 64 GB"),
        ("t4", ORIN, r"the bundle is for t4 \(SM 7\.5, x86_64\)"),
    ],
)
def test_a_board_outside_the_target_is_refused_by_its_facts(
    target: str, board: Board, words: str, tmp_path: Path
):
    path = made(tmp_path / "demo", target)
    with pytest.raises(UserError, match=words):
        finalized(path, board)
    receipt = finalized(path, board, options=FinalizeOptions(rounds=7, any_board=True))
    assert receipt.library == "onnxruntime"
    assert "told to go on outside the target" in receipt.notes


def test_a_family_finds_the_member_that_this_board_is(tmp_path: Path):
    path = made(tmp_path / "demo", "jetson-agx")
    half = msgspec.structs.replace(ORIN, memory_bytes=32_000_000_000)
    assert finalized(path, ORIN).member == "jetson-agx-orin-64gb"
    assert finalized(path, half).member == "jetson-agx-orin-32gb"
    assert finalized(path, THOR).member == "jetson-agx-thor"


def test_a_host_without_a_gpu_stands_in_and_says_so(tmp_path: Path):
    receipt = finalized(made(tmp_path / "demo", "jetson-agx-orin-64gb"), LAPTOP)
    assert (receipt.member, receipt.library) == (None, "onnxruntime")
    assert any("its times say nothing of it" in note for note in receipt.notes)


@pytest.mark.parametrize(
    ("libraries", "more", "words"),
    [
        ({"onnxruntime": "1"}, {}, "install tensorrt, or pass --engine onnxruntime"),
        ({"onnxruntime": "1"}, {"trtexec_version": "10.3.0"}, "--system-site-packages"),
        ({"onnxruntime": "1", "tensorrt": "8.5.2"}, {}, "of lane B, tensorrt 8.5.2 takes lane A"),
    ],
)
def test_a_board_without_the_right_tensorrt_is_told_what_to_do(libraries, more, words, tmp_path: Path):
    board = msgspec.structs.replace(ORIN, libraries=libraries, **more)
    with pytest.raises(UserError, match=words):
        finalized(made(tmp_path / "demo", "jetson-agx-orin-64gb"), board)


def test_too_little_memory_is_said_before_an_hour_of_building(tmp_path: Path):
    board = msgspec.structs.replace(ORIN, memory_available_bytes=100 << 20)
    builder = Builder()
    with pytest.raises(UserError, match=r"building the largest tower needs .* and 0\.10 GB are free"):
        finalized(made(tmp_path / "demo", "jetson-agx-orin-64gb"), board, builder=builder)
    assert builder.requests == []


T4 = Board(
    model="Some Xeon",
    machine="x86_64",
    sm=75,
    gpu="Tesla T4",
    memory_bytes=64 << 30,
    memory_available_bytes=60 << 30,
    gpu_memory_bytes=16 << 30,
    gpu_memory_free_bytes=15 << 30,
    libraries={"tensorrt-rtx": "1.7.1.116"},
)


def test_a_gpu_that_others_have_filled_is_said_before_anything_is_built(tmp_path: Path):
    """The host has memory enough, and the engine would not fit where it is built and run."""
    full = msgspec.structs.replace(T4, gpu_memory_free_bytes=100 << 20)
    builder = Builder()
    words = r"building the largest tower needs 0\.31 GB of the GPU's memory and 0\.10 GB are free; end other"
    with pytest.raises(UserError, match=words):
        finalized(made(tmp_path / "demo", "t4"), full, builder=builder)
    assert builder.requests == []
    untold = msgspec.structs.replace(T4, gpu_memory_bytes=100 << 20, gpu_memory_free_bytes=None)
    with pytest.raises(UserError, match=r"0\.10 GB are free"):
        finalized(made(tmp_path / "other", "t4"), untold, builder=builder)
    unknown = msgspec.structs.replace(T4, gpu_memory_bytes=0, gpu_memory_free_bytes=None)
    assert finalized(made(tmp_path / "third", "t4"), unknown, builder=builder).chosen == "int8"


def test_a_part_of_a_gpu_answers_to_its_kind_and_says_that_it_has_less(tmp_path: Path):
    whole = resolve_target(load_target("t4"))
    member, why = member_for(T4, whole)
    assert (member and member.name, why) == ("t4", "SM 7.5 and its memory fit t4")
    member, why = member_for(msgspec.structs.replace(T4, gpu_memory_bytes=5 << 30), whole)
    assert member is not None
    assert why == "SM 7.5 fits t4, whose profile counts on 16 GB where this GPU has 5.4 GB"


def test_a_gpu_host_gets_real_tensorrt_rtx_engines(tmp_path: Path):
    pytest.importorskip("tensorrt_rtx_bindings")
    from edgeglm.compile.worker import engine_built_apart
    from edgeglm.engines.libraries import installed_version

    version = installed_version("tensorrt-rtx")
    assert version is not None
    t4 = Board(
        model="Some Xeon",
        machine="x86_64",
        sm=75,
        gpu="Tesla T4",
        memory_bytes=16 << 30,
        memory_available_bytes=8 << 30,
        libraries={"tensorrt-rtx": version},
    )
    path = made(tmp_path / "demo", "t4")
    tools = Tools(embedder=_embedder, portable=portable, native=Builder().run, build=engine_built_apart)
    with open_bundle(path) as bundle:  # built for SM 7.5 with no GPU here; a stand-in runs the plans
        receipt = finalize(bundle, board=t4, tools=tools, progress=QuietProgress(), options=QUICK)
    assert (receipt.library, receipt.evidence, receipt.chosen) == ("tensorrt-rtx", "real GPU", "int8")
    for use in receipt.candidate("int8").engines.values():
        folder = finalized_folder(path) / "engines" / use.signature
        record = json.loads((folder / "engine.json").read_bytes())
        assert (record["sms"], record["library_version"]) == ([75], version)
        assert record["size_bytes"] == (folder / "engine.plan").stat().st_size > 1000
