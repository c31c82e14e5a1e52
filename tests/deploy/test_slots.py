"""What a device keeps while it is deployed to: the former bundle, and engines that were finished."""

from __future__ import annotations

import json

import msgspec
import pytest

from edgeglm.deploy.device import engines, switch
from edgeglm.deploy.device.layout import Layout
from edgeglm.deploy.device.wire import Refused
from scripts.fixtures.proxy import cable
from tests.deploy.helpers import content


def reused(summary) -> bool:
    (one,) = summary.devices
    assert one.outcome == "done", one.reason
    return bool(one.delivered.receipt["reused"])


def slots(device) -> list[str]:
    return sorted(path.name for path in (device.root / "slots").iterdir())


@pytest.mark.parametrize("fault", ["wrong answers", "dies"])
def test_a_deploy_that_fails_leaves_what_a_rollback_goes_back_to(fault, device, bundle, deploy, cli):
    pear = device("pear")
    one, two = bundle("one"), bundle("two")
    for path in (one, two):
        assert deploy(path).exit_code == 0
    assert deploy(bundle("bad", recipe=fault)).exit_code == 3
    assert pear.answers() == content(two)
    cli("rollback", "pear")
    assert pear.answers() == content(one)
    better = bundle("better")
    assert deploy(better).exit_code == 0
    assert pear.answers() == content(better)
    cli("rollback", "pear")
    assert pear.answers() == content(one)


def test_who_goes_back_waits_as_long_as_the_deploy_of_that_bundle_did(tmp_path, monkeypatch):
    layout = Layout(tmp_path)
    layout.make()
    for slot, waited in (("a", 300.0), ("b", 2.0)):
        (layout.slots / slot).mkdir()
        layout.write_record(slot, ready_seconds=waited)
    (layout.root / "device.json").write_text('{"service": "process", "host": "127.0.0.1", "port": 0}')
    layout.point("current", "b")
    asked = {}

    def waited_for(service: object, slot: str, seconds: float) -> str | None:
        asked[slot] = seconds
        return "it fails" if slot == "a" else None

    monkeypatch.setattr(switch, "wait_ready", waited_for)
    monkeypatch.setattr("edgeglm.deploy.device.service.ProcessService.restart", lambda _: None)
    with pytest.raises(Refused, match="the former one serves again"):
        switch.activate(layout, "a", None)
    assert asked == {"a": 300.0, "b": 60.0}


def test_the_bundle_before_the_former_one_goes_once_the_new_one_serves(device, bundle, deploy):
    pear = device("pear")
    for name in ("one", "two", "three", "four"):
        assert deploy(bundle(name)).exit_code == 0
        assert len(slots(pear)) <= 2


def test_a_former_bundle_that_was_not_waited_for_can_be_gone_back_to_again(device, bundle, deploy, cli):
    pear = device("pear")
    slow, quick = bundle("slow", recipe="loads for 1 s"), bundle("quick")
    deploy(slow)
    deploy(quick)
    words = cli("rollback", "pear", "--ready-seconds", "0.2", code=3)
    assert "the former bundle never got ready: it did not answer within 0.2 s" in words
    assert pear.answers() == content(quick)
    cli("rollback", "pear")
    assert pear.answers() == content(slow)


def test_the_same_deploy_again_leaves_what_a_rollback_goes_back_to(device, bundle, deploy, cli, options):
    pear = device("pear")
    one, two = bundle("one"), bundle("two")
    for path in (one, two, two):
        assert deploy(path).exit_code == 0
    cli("rollback", "pear")
    assert pear.answers() == content(one)
    cli("rollback", "pear")
    assert pear.answers() == content(two)
    assert deploy(two, options=msgspec.structs.replace(options, serve_flags=("--no-page",))).exit_code == 0
    cli("rollback", "pear")
    assert "--no-page" not in pear.record()["serve_flags"], "served otherwise it is another one"


def test_a_staged_bundle_takes_no_place_of_the_former_one_and_outlives_a_rollback(
    device, bundle, deploy, options, cli
):
    pear = device("pear")
    one, two, three = (bundle(name, tower=name.encode()) for name in ("one", "two", "three"))
    for path in (one, two):
        deploy(path)
    staged = msgspec.structs.replace(options, activate=False)
    assert not reused(deploy(three, options=staged))
    slots = json.loads(cli("devices", "--json"))[0]["slots"]
    assert {slot: one["state"] for slot, one in slots.items()} == {"a": "ready", "b": "ready", "c": "staged"}
    deploy(bundle("refused", recipe="wrong answers"), options=staged)
    assert json.loads(cli("devices", "--refresh", "--json"))[0]["slots"]["c"]["state"] == "begun"
    assert deploy(three, options=staged).exit_code == 0
    cli("rollback", "pear")
    assert pear.answers() == content(one)
    assert reused(deploy(three)), "its engines were finished when it was staged"
    assert pear.answers() == content(three)


def test_engines_that_were_finished_before_a_cut_are_found_by_the_next_run(server, device, bundle, deploy):
    with cable(server.port) as way:
        device("pear", port=way.port)
        deploy(bundle("good"))
        fresh = bundle("fresh", recipe="finalize takes 1 s", tower=b"another")

        def pull(name: str, state: str, note: str) -> None:
            if note == "finalize: fp32":
                way.cut()

        (one,) = deploy(fresh, on_change=pull).devices
        assert one.outcome == "failed"
        assert reused(deploy(fresh))


def test_engines_of_the_former_bundle_are_found_when_it_is_deployed_again(device, bundle, deploy):
    device("pear")
    one = bundle("one", tower=b"first")
    assert not reused(deploy(one))
    assert not reused(deploy(bundle("two", tower=b"second")))
    assert reused(deploy(one))


def test_bundles_that_fail_do_not_pile_up(device, bundle, deploy):
    pear = device("pear")
    deploy(bundle("good"))
    counts = set()
    for number in range(3):
        deploy(bundle(f"bad-{number}", recipe="wrong answers", tower=f"tower {number}".encode()))
        counts.add(len(list((pear.root / "objects").iterdir())))
    assert len(counts) == 1, "the objects of the one before are gone"
    assert len(list((pear.root / "slots/b" / engines.ENGINES).iterdir())) == 2, (
        "the running one's, and its own"
    )


@pytest.mark.parametrize("engine", ["auto", "onnxruntime"])
def test_a_device_that_serves_without_timing_caches_gets_those_of_another_board(
    engine, device, bundle, deploy, options
):
    device("pear")
    plum = device("plum")
    assert deploy(bundle("without", tower=b"by hand", recipe="keeps no cache"), "plum").exit_code == 0
    one = bundle("one")
    deploy(one, "pear")
    found: list[str] = []

    def look(name: str, state: str, note: str) -> None:
        if state == "finalize" and not note:
            caches = plum.root.glob("slots/b/bundle.finalized/engines/*/timing.cache")
            found.extend(path.read_text() for path in caches)

    mine = msgspec.structs.replace(options, engine=engine)
    assert deploy(bundle("two", tower=b"second"), "plum", options=mine, on_change=look).exit_code == 0
    helped = [f"timing.cache of {content(one)}"]
    assert found == (helped if engine == "auto" else []), "ONNX Runtime builds nothing that they would help"
    (again,) = deploy(bundle("three", tower=b"second"), "plum").devices
    assert again.delivered.files_sent <= 3, "now it has its own, and none travels"


def test_what_was_sent_replaces_no_engine_that_lies_there(tmp_path):
    layout = Layout(tmp_path)
    layout.make()
    digest = "0" * 64
    (layout.objects / digest).write_text("of another board")
    current = layout.slots / "a" / engines.ENGINES / "same"
    current.mkdir(parents=True)
    (current / "timing.cache").write_text("own")
    (layout.slots / "a" / engines.ENGINES / ".half").mkdir()
    layout.point("current", "a")
    folder = layout.slots / "b"
    sent = {"same/timing.cache": digest, "other/timing.cache": digest}
    engines.brought(layout, folder, [], sent)
    engines.brought(layout, folder, [], sent)
    texts = {path.parent.name: path.read_text() for path in (folder / engines.ENGINES).glob("*/timing.cache")}
    assert texts == {"same": "own", "other": "of another board"}
    assert (current / "timing.cache").stat().st_nlink == 2, "it lies there once"
