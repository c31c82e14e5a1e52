"""Deploying over a real OpenSSH server: what travels, what serves, and what goes back by itself."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import signal
import sys
import time
import urllib.request
from pathlib import Path

import msgspec
import pytest

from edgeglm.core.store import Store, default_store_root
from scripts.fixtures.colours import COLOURS, picture
from scripts.fixtures.loopback import Device, stop
from scripts.fixtures.proxy import cable
from tests.deploy.helpers import content, real_bundle

# The questions, and the lines of the manifest that changed; the device's side itself is there.
OVERHEAD = 6_000
# The same, the answers, and what SSH itself needs, half of it to agree on keys.
WHOLE_TALK = 18_000


def test_a_bundle_is_finalized_and_served(device, bundle, deploy, inventory):
    pear = device("pear")
    path = bundle()
    states = []
    summary = deploy(path, "pear", on_change=lambda *said: states.append(said[1:]))
    assert summary.exit_code == 0, summary.devices
    (one,) = summary.devices
    assert pear.answers() == content(path)
    assert pear.record()["state"] == "ready"
    assert ("finalize", "finalize: fp32") in states, "the device's progress is streamed back"
    (seen,) = inventory.devices()
    assert (seen.name, seen.serving, seen.ready) == ("pear", "a", True)
    assert seen.url == one.delivered.url


def test_a_redeploy_with_one_tower_changed_moves_that_tower_and_little_else(device, bundle, deploy):
    pear = device("pear")
    names = [f"gallery/thumbnails/{number}.png" for number in range(300)]
    many = {name: os.urandom(40) for name in names}
    deploy(bundle("one", payload=os.urandom(200_000), **many))
    tower = os.urandom(1_500_000)
    former = pear.home.parent.parent / "bundles/one/manifest.json"
    lines = former.read_bytes()
    same = {name: (former.parent / name).read_bytes() for name in names}
    again = bundle("one", payload=(former.parent / "costs/payload.bin").read_bytes(), tower=tower, **same)
    assert lines != (again / "manifest.json").read_bytes()
    (one,) = deploy(again).devices
    assert one.delivered.files_sent == 2, "the tower, and the bill of materials that names its digest"
    assert one.delivered.sent_bytes < 1.01 * len(tower) + OVERHEAD
    assert pear.answers() == content(again)


def test_the_same_bundle_again_moves_no_file(server, device, bundle, deploy):
    with cable(server.port) as way:
        device("pear", port=way.port)
        path = bundle(payload=os.urandom(100_000))
        deploy(path)
        before = way.carried
        (one,) = deploy(path).devices
        assert (one.outcome, one.delivered.files_sent) == ("done", 0)
        assert one.delivered.sent_bytes < OVERHEAD
        assert way.carried - before < WHOLE_TALK


@pytest.mark.parametrize("name", ["one", "two"])
def test_objects_that_are_damaged_or_gone_travel_again(name, device, bundle, deploy):
    pear = device("pear")
    deploy(bundle("one"))
    for number, path in enumerate(sorted((pear.root / "objects").iterdir())):
        path.unlink()
        if number % 2:
            path.write_bytes(b"damaged")
    path = bundle(name)
    (one,) = deploy(path).devices
    assert one.outcome == "done", one.reason
    assert pear.answers() == content(path)


def test_rollback_serves_the_former_bundle_and_another_one_comes_back(device, bundle, deploy, inventory, cli):
    pear = device("pear")
    one, two = bundle("one"), bundle("two")
    deploy(one)
    deploy(two)
    assert pear.answers() == content(two)
    answer = json.loads(cli("rollback", "pear", "--json"))
    assert answer[0]["answer"]["to"] == "a"
    assert pear.answers() == content(one)
    cli("rollback", "pear")
    assert pear.answers() == content(two)


def test_there_is_no_rollback_from_the_first_bundle(device, bundle, deploy, cli):
    device("pear")
    deploy(bundle())
    assert "no former bundle" in cli("rollback", "pear", code=2)


@pytest.mark.parametrize(
    ("recipe", "seconds", "words"),
    [("dies", 60.0, "it ended with status 2"), ("never ready", 2.0, "it did not answer within 2 s")],
)
def test_a_bundle_that_never_gets_ready_is_rolled_back_by_itself(
    recipe, seconds, words, device, bundle, deploy, options
):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    (one,) = deploy(
        bundle("bad", recipe=recipe), options=msgspec.structs.replace(options, ready_seconds=seconds)
    ).devices
    assert (one.outcome, one.exit_code) == ("failed", 3)
    assert words in one.reason
    assert "the former one serves again" in one.reason
    assert pear.answers() == content(good)
    assert pear.record()["state"] == "ready"
    better = bundle("better")
    assert deploy(better).exit_code == 0
    assert pear.answers() == content(better)


def test_the_first_bundle_that_never_gets_ready_leaves_nothing_running(device, bundle, deploy):
    pear = device("pear")
    (one,) = deploy(bundle("bad", recipe="dies")).devices
    assert "the engine of this bundle is broken" in one.reason, "the program's own error is told"
    assert "nothing is now" in one.reason
    assert not (pear.root / "current").is_symlink()
    assert not (pear.root / "run/state.json").exists()


def test_a_bundle_that_answers_otherwise_there_is_never_switched_to(device, bundle, deploy):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    (one,) = deploy(bundle("bad", recipe="wrong answers")).devices
    assert (one.outcome, one.exit_code) == ("failed", 3)
    assert "no variant of colours answers here" in one.reason
    assert pear.answers() == content(good)


def test_a_bundle_that_is_worse_on_the_reference_is_never_switched_to(
    device, bundle, deploy, options, tmp_path
):
    pear = device("pear")
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "a.png").write_bytes(b"picture")
    pairs = [json.dumps({"image": "a.png", "text": text}) for text in ("a", "b")]
    (reference / "pairs.jsonl").write_text("\n".join(pairs))
    good = bundle("good", map10=0.5)
    deploy(good, reference=reference)
    worse = bundle("worse", map10=0.4)
    (one,) = deploy(worse, reference=reference).devices
    assert "is 0.4000 and the running bundle's 0.5000" in one.reason
    assert pear.answers() == content(good)
    lenient = msgspec.structs.replace(options, tolerance=0.2)
    assert deploy(worse, reference=reference, options=lenient).exit_code == 0
    assert pear.answers() == content(worse)


def test_a_staged_bundle_is_finalized_and_the_running_one_still_serves(device, bundle, deploy, options):
    pear = device("pear")
    good, staged = bundle("good"), bundle("staged")
    deploy(good)
    (one,) = deploy(staged, options=msgspec.structs.replace(options, activate=False)).devices
    assert one.delivered.url is None
    assert pear.answers() == content(good)
    assert (pear.root / "slots" / one.delivered.slot / "bundle.finalized/receipt.json").exists()


def test_evidence_of_the_device_comes_home_by_board_and_version(device, bundle, deploy):
    device("pear")
    deploy(bundle())
    (entry,) = kept()
    names = {path.name for path in (entry / "files").rglob("*") if path.is_file()}
    assert names == {"receipt.json", "engine.json", "layers.json", "timing.cache", "build.log", "place.json"}
    place = json.loads((entry / "files/place.json").read_bytes())
    assert place["board"]["machine"] == platform.machine()
    assert place["library"] == ["onnxruntime", "1.24.4"]


def kept() -> list[Path]:
    """The entries of the store that devices sent home."""
    entries = (default_store_root() / "entries").iterdir()
    return [entry for entry in entries if b"device-build" in (entry / "entry.json").read_bytes()]


def test_evidence_is_kept_once_for_a_bundle_and_found_again_by_its_device(device, bundle, deploy, cli):
    device("pear"), device("plum")
    one, two = bundle("one"), bundle("two")
    for path in (one, one, two):
        assert deploy(path, "pear", "plum").exit_code == 0
    assert len(kept()) == 2, "one a bundle, and not one a deploy or a device: all are of one kind"
    for row in json.loads(cli("devices", "--json")):
        assert content(two) in (Path(row["evidence"]) / "receipt.json").read_text()


def test_the_timing_cache_of_one_board_helps_the_next_of_its_kind(device, bundle, deploy):
    device("pear")
    plum = device("plum")
    deploy(bundle("one"), "pear")
    two = bundle("two", recipe="finalize takes 0.3 s")
    found = {}

    def look(name: str, state: str, note: str) -> None:
        engines = plum.root / "slots/a/bundle.finalized/engines"
        if state == "finalize" and not note:
            found.update({path.name: path.read_text() for path in engines.glob("*/*")})

    assert deploy(two, "plum", on_change=look).exit_code == 0
    assert sorted(found) == ["engine.json", "timing.cache"]
    assert found["timing.cache"] == f"timing.cache of {content(plum.home.parent.parent / 'bundles/one')}"
    assert deploy(bundle("three"), "plum").devices[0].delivered.files_sent <= 3, "it travels once"


def test_no_quota_of_the_store_drops_what_a_device_sent_home(device, bundle, deploy, cli):
    device("pear")
    deploy(bundle())
    Store(default_store_root()).collect(quota_bytes=0)
    assert len(kept()) == 1


def test_old_objects_go_and_those_of_both_slots_stay(device, bundle, deploy, cli):
    pear = device("pear")
    paths = [bundle(name, payload=name.encode() * 50_000) for name in ("one", "two", "three")]
    for path in paths:
        deploy(path)
    digests = [hashlib.sha256((path / "costs/payload.bin").read_bytes()).hexdigest() for path in paths]
    assert [(pear.root / "objects" / digest).exists() for digest in digests] == [False, True, True]
    cli("remove", "pear", "--old")
    assert [(pear.root / "objects" / digest).exists() for digest in digests] == [False, False, True]
    assert pear.answers() == content(paths[2])
    cli("remove", "pear")
    assert not pear.root.exists()
    assert cli("devices", "--json") == "[]\n"


def test_a_device_that_nobody_knows_is_named_and_forgetting_nobody_is_bad_input(device, bundle, deploy, cli):
    device("pear")
    deploy(bundle())
    assert "unknown device 'peer'; known: pear; did you mean 'pear'?" in cli("devices", "peer", code=2)
    assert "unknown device" in cli("devices", "peer", "--forget", code=2)
    assert "--forget needs the NAMES" in cli("devices", "--forget", code=2)
    cli("devices", "pear", "--forget")
    assert cli("devices", "--json") == "[]\n"


def test_a_deploy_without_a_root_goes_where_the_device_has_one(device, bundle, deploy, options):
    pear = device("pear")
    there = pear.home / "disk/edgeglm"
    deploy(bundle("one"), options=msgspec.structs.replace(options, root=str(there)))
    two = bundle("two")
    assert deploy(two).exit_code == 0
    assert json.loads((there / "current/slot.json").read_bytes())["content_digest"] == content(two)
    assert not pear.root.exists()
    stop(Device("pear", pear.home), root=there)


def test_devices_and_logs_tell_what_is_there(device, bundle, deploy, cli):
    device("pear")
    deploy(bundle())
    (row,) = json.loads(cli("devices", "--refresh", "--json"))
    assert row["slots"]["a"]["bundle"] == "colours"
    assert row["receipt"]["chosen"] == "fp32", "a refresh keeps the last receipt"
    assert row["free_bytes"] > 0
    assert "pear" in cli("devices")
    cli("logs", "pear")


def test_the_variant_of_a_device_is_that_of_the_bundle_that_serves(device, bundle, deploy, options, cli):
    device("pear")
    deploy(bundle("one"))
    deploy(bundle("two", recipe="chooses int8"))
    assert variants(cli("devices")) == ["int8"]
    cli("rollback", "pear")
    for refresh in ((), ("--refresh",)):
        assert variants(cli("devices", *refresh)) == ["fp32"], "and not that of the last deploy"
    deploy(bundle("three", recipe="chooses int8"), options=msgspec.structs.replace(options, activate=False))
    assert variants(cli("devices")) == ["fp32"], "what was staged serves nobody"


def variants(table: str) -> list[str]:
    return re.findall(r"ready\s+(\S+)", table)


def test_a_line_of_the_log_is_one_line_for_whoever_parses_it(device, bundle, deploy, cli):
    """They are JSON documents of some 700 characters, and were cut into lines of 160."""
    pear = device("pear")
    deploy(bundle())
    lines = [json.dumps({"event": "serving", "digest": "word " * 200}), '{"event":  "stopped"}']
    (pear.root / "run/service.log").write_text("\n".join(lines) + "\n")
    assert cli("logs", "pear") == "\n".join(lines) + "\n"


def test_a_server_that_dies_is_started_again(device, bundle, deploy):
    pear = device("pear")
    path = bundle()
    deploy(path)
    state = json.loads((pear.root / "run/state.json").read_bytes())
    os.kill(state["child"], signal.SIGKILL)
    for _ in range(200):
        state = json.loads((pear.root / "run/state.json").read_bytes())
        if state["restarts"] == 1 and state["ready"]:
            break
        time.sleep(0.05)
    assert pear.answers() == content(path)


def test_real_towers_are_finalized_served_and_held_to_a_reference(
    device, bundle, deploy, options, tmp_path, repository
):
    # The one test with the real commands at both ends: this very environment stands for the device's own.
    pear = device("pear", PATH=os.environ["PATH"])
    reference = tmp_path / "reference"
    reference.mkdir()
    for colour, value in COLOURS.items():
        (reference / f"{colour}.png").write_bytes(picture(value))
    lines = [json.dumps({"image": f"{colour}.png", "text": colour}) for colour in COLOURS]
    (reference / "pairs.jsonl").write_text("\n".join(lines))
    mine = msgspec.structs.replace(options, python=sys.executable, ready_seconds=60.0, rounds=7)
    notes = []
    summary = deploy(
        real_bundle(tmp_path / "real"),
        options=mine,
        reference=reference,
        on_change=lambda *said: notes.append(said[1:]),
    )
    assert summary.exit_code == 0, summary.devices
    one = summary.devices[0].delivered
    assert one.map10 == {"new": 1.0}
    assert ("finalize", "finalize colours: timing") in notes
    with urllib.request.urlopen(f"{one.url}/v2/health/ready", timeout=5) as answer:
        assert answer.status == 200
    assert pear.record()["state"] == "ready"
    worse = deploy(real_bundle(tmp_path / "worse", scale=-1.0), options=mine, reference=reference)
    assert worse.exit_code == 3
    assert pear.record()["content_digest"] == one.content_digest


def test_a_build_on_a_device_stages_it_there_and_brings_the_evidence_home(
    device, bundle, cli, stub, tmp_path
):
    # The build itself is tested elsewhere: this is what follows it.
    from edgeglm.cli.build import _hosts, _staged_on
    from edgeglm.cli.console import App

    pear = device("pear")
    summary = _staged_on(App(json=True), bundle(), _hosts(("pear",)), python=stub)
    assert summary.exit_code == 0, summary.devices
    (one,) = summary.devices
    assert one.delivered is not None
    assert one.delivered.url is None
    assert not (pear.root / "current").is_symlink()
    assert len(kept()) == 1
    assert "--on USER@HOST" in cli("build", "--help")


def test_a_build_that_a_device_refuses_says_how_to_go_on_without_building_again(device, bundle, capsys):
    from edgeglm.cli.build import _hosts, _staged_on
    from edgeglm.cli.console import App

    device("pear")
    path = bundle()
    assert _staged_on(App(), path, _hosts(("pear",)), python="/nowhere/python").exit_code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"the options that are named: edgeglm deploy {path} pear --stage" in told


def test_what_a_device_says_cannot_steer_the_terminal(device, bundle, deploy, options, cli, tmp_path):
    tree = tmp_path / "board/proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "model").write_text("An Orin\x1b[2J\0")
    pear = device("pear", EDGEGLM_DEVICE_FILES=str(tmp_path / "board"))
    assert deploy(bundle(), options=msgspec.structs.replace(options, any_board=True)).exit_code == 0
    (row,) = json.loads(cli("devices", "--json"))
    assert row["board"].startswith("An Orin\ufffd[2J, ")
    with (pear.root / "run/service.log").open("a") as log:
        log.write("\x1b[2J\x1b]0;owned\x07a caf\u00e9\n")
    words = cli("logs", "pear")
    assert "\x1b" not in words
    assert "a caf\u00e9" in words
