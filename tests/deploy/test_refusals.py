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
from edgeglm.deploy.hosts import host_from_text, hosts_from_texts
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.preflight import board_from_facts, check_clock, check_space
from edgeglm.deploy.report import Report
from edgeglm.deploy.verdict import finalized, judged
from edgeglm.engines.board import Board
from edgeglm.targets.schema import load_target, resolve_target, toml_from_resolved
from scripts.fixtures.loopback import Device, stop
from tests.deploy.test_deploy import content, real_bundle


def reason(summary, *, code: int = 2) -> str:
    """Return why the one device was not deployed to: with this code, and what to do in the last clause."""
    (one,) = summary.devices
    assert one.outcome == "failed", one
    assert (one.exit_code, summary.exit_code) == (code, code), one
    fact, _, remedy = one.reason.rpartition("; ")
    assert fact, one.reason
    assert len(remedy.split()) > 2, one.reason
    return str(one.reason)


def test_an_unknown_host_key_is_refused(sender, device, bundle, deploy):
    device("pear")
    (sender / ".ssh/known_hosts").write_text("")
    words = reason(deploy(bundle()))
    assert "the host key of pear is not known" in words
    assert words.endswith("to known_hosts")


def test_a_changed_host_key_is_refused_and_told_from_an_unknown_one(sender, device, bundle, deploy):
    device("pear")
    known = sender / ".ssh/known_hosts"
    other = (sender / ".ssh/pear.pub").read_text().rpartition(" ")[0]
    known.write_text(f"{known.read_text().split()[0]} {other}\n")
    assert "the host key of pear has changed" in reason(deploy(bundle()))


def test_known_hosts_that_cannot_be_read_are_told_as_such(sender, device, bundle, deploy):
    device("pear")
    with (sender / ".ssh/known_hosts").open("a") as file:
        file.write("half-a-line\n")
    words = reason(deploy(bundle()))
    assert "cannot read the known hosts or the SSH configuration for pear: Invalid known hosts entry" in words


def test_a_configuration_that_checks_no_host_key_is_refused(sender, device, bundle, deploy):
    device("pear")
    with (sender / ".ssh/config").open("a") as file:
        file.write("  UserKnownHostsFile none\n")
    assert "turns the check of pear's key off" in reason(deploy(bundle()))


def test_a_user_whose_key_is_not_accepted_is_told_so(server, sender, device, bundle, deploy):
    device("pear")
    (server.folder / "authorized_keys").write_text("")
    words = reason(deploy(bundle()))
    assert "pear refused user" in words
    assert "ssh-copy-id" in words


def test_a_user_that_is_not_there_is_told_so(device, bundle, deploy):
    device("pear")
    summary = deploy(bundle(), "nobody-here@pear")
    assert "refused user 'nobody-here'" in reason(summary)


def test_a_device_that_is_off_is_told_so(sender, bundle, deploy):
    with (sender / ".ssh/config").open("a") as file:
        file.write("Host pear\n  HostName 127.0.0.1\n  Port 1\n")
    assert "cannot reach pear" in reason(deploy(bundle()), code=1)


def only(folder: Path, **programs: str | None) -> str:
    """Return a PATH on which a device finds a shell and these programs, and nothing else."""
    folder.mkdir()
    for name, program in {"sh": shutil.which("sh"), **programs}.items():
        assert program is not None
        (folder / name).symlink_to(program)
    return str(folder)


def test_a_device_without_python_is_told_so(device, bundle, deploy, tmp_path):
    device("pear", PATH=only(tmp_path / "bin"))
    assert reason(deploy(bundle())) == "pear has no Python; install python3 3.10 or newer there"


OLD = "import sys; sys.version_info = (3, 8, 10); exec(sys.argv[1])"


def old_pythons() -> dict[str, str]:
    """Return interpreters that are too old, by version: of the system, or beside the one that runs this."""
    versions = ("2.7", "3.6", "3.7", "3.8", "3.9")
    beside = [
        path for path in Path(sys.base_prefix).parent.glob("*/bin/python*") if path.name[6:] in versions
    ]
    found = {path.name[6:]: str(path) for path in beside}
    for version in versions:
        if (program := shutil.which(f"python{version}")) and "shims" not in program:
            found.setdefault(version, program)
    return found


def test_a_device_with_too_old_a_python_is_told_which(device, bundle, deploy, tmp_path):
    found = old_pythons()
    if not found:
        pytest.skip("NO OLD PYTHON HERE: with python2.7 or python3.8 installed this would test one")
    for version, program in found.items():
        name = f"pear-{version.replace('.', '-')}"
        device(name, PATH=only(tmp_path / version, python3=program))
        words = reason(deploy(bundle(), name))
        assert f"has Python {version}, and edgeglm needs 3.10 or newer" in words
        assert "docs/jetson.md" in words


def test_a_python_that_says_it_is_too_old_is_told_where_none_is_installed(device, bundle, deploy, tmp_path):
    (tmp_path / "old").write_text(f'#!/bin/sh\nexec {sys.executable} -c "$OLD" "$5"\n')
    (tmp_path / "old").chmod(0o755)
    python = {"python3": str(tmp_path / "old"), "dirname": shutil.which("dirname")}
    device("pear", PATH=only(tmp_path / "bin", **python), OLD=OLD)
    words = reason(deploy(bundle()))
    assert "pear has Python 3.8, and edgeglm needs 3.10 or newer; install one there" in words


def test_a_newer_python_beside_an_old_one_is_found(device, bundle, deploy, tmp_path):
    (tmp_path / "old").write_text(f'#!/bin/sh\nexec {sys.executable} -c "$OLD" "$5"\n')
    (tmp_path / "old").chmod(0o755)
    python = {
        "python3": str(tmp_path / "old"),
        "python3.12": str(tmp_path / "broken"),
        "python3.11": sys.executable,
    }
    (tmp_path / "broken").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "broken").chmod(0o755)
    device("pear", PATH=only(tmp_path / "bin", **python, dirname=shutil.which("dirname")), OLD=OLD)
    (one,) = deploy(bundle()).devices
    assert one.outcome == "done", one.reason


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


ORIN_NANO = {
    "proc/device-tree/compatible": "nvidia,p3767-0003\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic",
    "proc/meminfo": "MemTotal: 7620000 kB\nMemAvailable: 6000000 kB\n",
}


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
    (tmp_path / "bare").write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    (tmp_path / "bare").chmod(0o755)
    bare = msgspec.structs.replace(options, python=str(tmp_path / "bare"))
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


def test_a_device_whose_shell_talks_is_told_so(device, bundle, deploy, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").write_text('#!/bin/bash\necho Welcome\nexec /bin/sh "$@"\n')
    (tmp_path / "bin/sh").chmod(0o755)
    device("pear", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert "Python" in reason(deploy(bundle())) or "said" in reason(deploy(bundle()))


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "a b", "user@", "host:99999", "host:0", "a@b@c", "h;rm"]
)
def test_a_malformed_device_is_bad_input(text):
    with pytest.raises(UserError, match="is no device; write it as"):
        host_from_text(text)


def test_an_address_of_one_link_names_its_interface():
    found = host_from_text("anna@[fe80::1%usb0]:2222")
    assert (found.user, found.host, found.port) == ("anna", "fe80::1%usb0", 2222)


def test_a_name_that_no_device_can_have_is_not_blamed_on_the_configuration(sender, bundle, deploy):
    assert "pear..local is no name of a device" in reason(deploy(bundle(), "pear..local"))


def test_devices_are_named_once(cli):
    with pytest.raises(UserError, match="named twice"):
        hosts_from_texts(["pear", "pear"])
    assert "give a bundle and at least one device" in cli("deploy", code=2)
    assert "there is no bundle at nowhere" in cli("deploy", "nowhere", "pear", code=2)
    assert "99999 is not in the range 0<=x<=65535" in cli("deploy", "b", "pear", "--port", "99999", code=2)


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
