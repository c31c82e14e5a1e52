"""What is refused, in what words, and that nothing has changed on the device after it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edgeglm.bundle.sign import sign_bundle
from edgeglm.bundle.signing import make_key
from edgeglm.core.errors import UserError
from edgeglm.deploy.device.objects import wanted_files
from edgeglm.deploy.device.wire import Refused
from edgeglm.deploy.evidence import evidence_from
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.preflight import board_from_facts, check_clock, check_space
from edgeglm.deploy.report import Report
from edgeglm.deploy.verdict import finalized, judged
from edgeglm.engines.board import Board
from edgeglm.targets.schema import load_target, resolve_target, toml_from_resolved
from scripts.fixtures.loopback import Device, stop
from tests.deploy.helpers import ORIN_NANO, content, program, real_bundle, reason


def test_a_folder_that_is_not_ours_is_told(device, bundle, deploy, options):
    pear = device("pear")
    (pear.home / "file").touch()
    mine = msgspec.structs.replace(options, root=str(pear.home / "file" / "edgeglm"))
    assert "Not a directory; give that user the right to" in reason(deploy(bundle(), options=mine))


def test_a_clock_that_is_off_by_a_day_is_told(device, bundle, deploy, options, monkeypatch):
    pear = device("pear")
    monkeypatch.setattr("edgeglm.deploy.delivery.clock", lambda: time.time() + 86_400)
    words = reason(deploy(bundle()))
    assert "the device's clock is 1.0 days behind this one's; set it" in words
    assert not pear.root.exists()
    anyway = msgspec.structs.replace(options, any_clock=True)
    assert deploy(bundle(), options=anyway).exit_code == 0
    with pytest.raises(UserError, match="15 minutes ahead"):
        check_clock({"time": 1000.0}, now=100.0)


def test_a_board_outside_the_target_is_refused_with_what_was_found(device, bundle, deploy, options, tmp_path):
    for name, text in ORIN_NANO.items():
        place = tmp_path / "board" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    pear = device("pear", EDGEGLM_DEVICE_FILES=str(tmp_path / "board"))
    thor = toml_from_resolved(resolve_target(load_target("jetson-agx-thor"))).encode()
    path = bundle(**{"target.toml": thor})
    words = reason(deploy(path))
    assert "Orin Nano" in words
    assert "SM 8.7" in words
    assert "or pass --any-board" in words
    assert not pear.root.exists(), "it is refused before a byte of the bundle has travelled"
    anyway = msgspec.structs.replace(options, any_board=True)
    assert deploy(path, options=anyway).exit_code == 0


def test_a_board_without_a_gpu_is_refused_a_bundle_for_one(device, bundle, deploy, options):
    pear = device("pear")
    orin = toml_from_resolved(resolve_target(load_target("jetson-agx"))).encode()
    path = bundle(**{"target.toml": orin})
    words = reason(deploy(path))
    assert "this device is outside target jetson-agx: this is" in words
    assert "and no GPU is seen on it; build a bundle for it" in words
    assert not pear.root.exists()
    anyway = msgspec.structs.replace(options, any_board=True)
    (one,) = deploy(path, options=anyway).devices
    assert one.outcome == "done", "a stand-in for a board, for those who know that it is one"


def test_a_device_that_is_being_deployed_to_names_the_owner_and_the_age(device, bundle, deploy, options):
    pear = device("pear")
    deploy(bundle("good"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(pear.root)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        now = msgspec.structs.replace(options, lock_seconds=0.0)
        words = reason(deploy(bundle("other"), options=now))
    finally:
        holder.communicate()
    assert "being deployed to by anna@desk (process" in words
    assert "since 0:0" in words
    assert deploy(bundle("other")).exit_code == 0, "the lock went with its process"


def test_who_waited_for_a_device_that_was_removed_meanwhile_begins_anew(device, bundle, deploy, options):
    pear = device("pear")
    deploy(bundle("good"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(pear.root)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"

    def removed() -> None:
        stop(pear)
        shutil.rmtree(pear.root)
        holder.communicate()

    later = threading.Timer(1.0, removed)

    def begin(name: str, state: str, note: str) -> None:
        if state == "lock":
            later.start()

    other = bundle("other")
    (one,) = deploy(other, on_change=begin).devices
    later.join()
    assert one.outcome == "done", one.reason
    assert pear.answers() == content(other)


HOLD = """
import sys
from pathlib import Path
from edgeglm.deploy.device.layout import Lock
lock = Lock(Path(sys.argv[1]))
lock.take("anna@desk", 0.0, lambda: False)
print("held", flush=True)
sys.stdin.read()
"""


def trusting(device, tmp_path) -> tuple[Device, Path]:
    """A device that trusts one maker, and the key that the maker signs with."""
    pytest.importorskip("cryptography")
    pear = device("pear", PATH=os.environ["PATH"])
    private, _ = make_key(tmp_path / "keys", "maker")
    (pear.home / "trust").mkdir()
    shutil.copy(private.with_suffix(".pub"), pear.home / "trust")
    return pear, private


def test_a_device_that_trusts_a_key_takes_only_what_it_signed(device, deploy, options, tmp_path):
    pear, private = trusting(device, tmp_path)
    real = msgspec.structs.replace(options, python=sys.executable, ready_seconds=60.0, rounds=7)
    path = real_bundle(tmp_path / "real")
    words = reason(deploy(path, options=real))
    assert "is not signed, and this machine takes bundles of maker only" in words
    assert not (pear.root / "current").is_symlink()
    sign_bundle(path, [private])
    (one,) = deploy(path, options=real).devices
    assert one.outcome == "done", one.reason


def test_a_device_that_trusts_a_key_goes_back_to_the_older_bundle(device, deploy, options, tmp_path, cli):
    pear, private = trusting(device, tmp_path)
    real = msgspec.structs.replace(options, python=sys.executable, ready_seconds=60.0, rounds=7)
    older, newer = (real_bundle(tmp_path / day, created=day) for day in ("2026-01-01", "2026-02-01"))
    for path in (older, newer):
        sign_bundle(path, [private])
        (one,) = deploy(path, options=real).devices
        assert one.outcome == "done", one.reason
    cli("rollback", "pear")
    assert pear.record()["content_digest"] == content(older)
    cli("rollback", "pear")
    assert "older" in reason(deploy(older, options=real)), "to deploy it anew needs the flag all the same"


def test_a_python_without_edgeglm_or_none_at_all_is_told(device, bundle, deploy, options, tmp_path):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    bare_python = program(tmp_path / "bare", f'exec {sys.executable} -S -I "$@"')
    bare = msgspec.structs.replace(options, python=str(bare_python))
    assert reason(deploy(bundle("other"), options=bare)).endswith(
        "has no edgeglm; leave --python out to bring it along"
    )
    absent = msgspec.structs.replace(options, python="/nowhere/python")
    assert "there is no Python at /nowhere/python on the device" in reason(deploy(good, options=absent))
    assert pear.answers() == content(good)


def test_an_older_bundle_than_the_running_one_needs_a_flag(device, bundle, deploy, options):
    pear = device("pear")
    new = bundle("new")
    deploy(new)
    old = bundle("old", created="2026-01-01")
    assert "it is older; pass --allow-downgrade" in reason(deploy(old))
    assert pear.answers() == content(new)
    meant = msgspec.structs.replace(options, allow_downgrade=True)
    assert deploy(old, options=meant).exit_code == 0
    assert pear.answers() == content(old)


def test_which_bundle_is_older_is_a_matter_of_moments_not_of_letters(device, bundle, deploy):
    device("pear")
    deploy(bundle("noon", created="2026-11-28T12:00:00+00:00"))
    assert deploy(bundle("later", created="2026-11-28T09:00:00-05:00")).exit_code == 0
    assert "it is older" in reason(deploy(bundle("sooner", created="2026-11-28T15:00:00+02:00")))


@pytest.mark.parametrize(
    "given", [("--ready-seconds", "nan"), ("--lock-seconds", "-1"), ("--tolerance", "nan")]
)
def test_a_wait_without_end_and_a_gate_that_is_none_are_bad_input(given, cli):
    assert f"Invalid value for '{given[0]}'" in cli("deploy", "bundle", "pear", *given, code=2)


def test_a_device_of_a_build_is_refused_before_anything_is_built(cli, monkeypatch):
    def built(*_: object, **__: object) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr("edgeglm.cli.build._built", built)
    given = ("build", "--target", "cpu", "--on")
    assert "'bad host' is no device; write it as" in cli(*given, "bad host", code=2)
    assert "named twice; name each device once" in cli(*given, "pear", "--on", "pear", code=2)
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    monkeypatch.setattr("edgeglm.deploy.ssh.sys", SimpleNamespace(modules={}))
    assert "pip install 'edgeglm[deploy]'" in cli(*given, "pear", code=2)


def test_a_broken_inventory_says_what_to_do(cli):
    Path(os.environ["EDGEGLM_STORE"], "devices.sqlite").write_bytes(b"no database" * 200)
    assert "remove it to begin anew" in cli("devices", code=2)


def test_an_environment_of_700_mb_is_counted(options: DeployOptions):
    check_space(1000, 2000, "/r", installs=False)
    with pytest.raises(UserError, match="MB are needed"):
        check_space(1000, 2000, "/r", installs=True)


@pytest.mark.parametrize("kind", ["texts", "files"])
@pytest.mark.parametrize(
    "name",
    [
        "../../.ssh/authorized_keys",
        "/etc/passwd",
        "bundle.finalized/engines/../../x/engine.json",
        "bundle.finalized/engines/e/engine.json/../../../../x",
        "bundle.finalized/engines/../receipt.json",
    ],
)
def test_a_device_cannot_name_a_file_of_the_senders(name, kind):
    class Taken:
        async def ask(self, *_: object, **__: object) -> dict[str, object]:
            answer: dict[str, dict[str, str]] = {"texts": {"bundle.finalized/receipt.json": ""}, "files": {}}
            answer[kind][name] = ""
            return dict(answer)

    with pytest.raises(UserError, match="nobody asked for; do not trust that device"):
        asyncio.run(evidence_from(Taken(), "a", "pear", Board(model="m", machine="aarch64"), {}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../../x", "/nowhere/x", "proc/device-tree/../../../x"])
def test_a_device_cannot_write_a_file_of_the_senders(name):
    with pytest.raises(UserError, match="nobody asked for; do not trust that device"):
        board_from_facts({"board_files": {name: "mine"}, "machine": "aarch64", "gpu": None})


def test_engines_that_the_server_cannot_run_are_no_delivery():
    class Jetson:
        async def ask(self, *_: object, **__: object) -> dict[str, object]:
            return {"code": 0, "words": [], "stdout": json.dumps({"library": "trtexec", "chosen": "int8"})}

    work = finalized(Jetson(), "a", DeployOptions(), Report())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="install python3-libnvinfer on the device, or pass --engine"):
        asyncio.run(work)


def test_a_signed_bundle_is_held_against_an_unsigned_one_that_runs():
    asked: dict[str, list[str]] = {}

    class Orin:
        async def ask(self, *_: object, slot: str, arguments: list[str]) -> dict[str, object]:
            asked[slot] = arguments
            return {"code": 0, "words": [], "stdout": '{"map10": 0.5}'}

    parcel: Any = SimpleNamespace(reference={"pairs.jsonl": "0" * 64})
    work = judged(Orin(), "b", {"current": "a"}, parcel, DeployOptions(), Report())  # type: ignore[arg-type]
    assert asyncio.run(work) == {"new": 0.5, "running": 0.5}
    assert ("--allow-unsigned" in asked["a"], "--allow-unsigned" in asked["b"]) == (True, False)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "a/../../x", "a\0b"])
def test_the_device_writes_no_file_outside_the_bundle_whatever_its_manifest_names(name: str) -> None:
    with pytest.raises(Refused, match="leads out of the bundle; get the bundle again from its maker"):
        wanted_files({"files": {name: {"sha256": "a" * 64, "size": 1}}})
