"""The connection may be cut anywhere: the former bundle serves on, the same command ends what was begun."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time

import msgspec
import pytest

from edgeglm.deploy.summary import FleetPlan
from scripts.fixtures.proxy import cable
from tests.deploy.helpers import content

POINTS = 20


def cut_at(points, server, device, bundle, deploy, *, seed: int) -> None:
    chance = random.Random(seed)
    with cable(server.port) as way:
        pear = device("pear", port=way.port)
        good = bundle("good")
        deploy(good)
        before = way.carried
        whole = bundle("whole", payload=os.urandom(400_000))
        deploy(whole)
        length = way.carried - before
        serving = whole
        for point in range(points):
            fresh = bundle(f"cut-{point}", payload=os.urandom(400_000), recipe="finalize takes 0.4 s")
            way.limit = way.carried + chance.randrange(1, length)
            (one,) = deploy(fresh).devices
            assert pear.answers() in (content(serving), content(fresh))
            if one.outcome == "done":  # the run was shorter than the one that was measured
                serving = fresh
                continue
            assert "run the same command again" in one.reason or "cannot talk" in one.reason, one.reason
            way.limit = None
            (again,) = deploy(fresh).devices
            assert again.outcome == "done", again.reason
            assert pear.answers() == content(fresh)
            serving = fresh


def test_a_cut_at_five_points_leaves_the_former_bundle_serving(server, device, bundle, deploy):
    cut_at(5, server, device, bundle, deploy, seed=1)


@pytest.mark.slow
def test_a_cut_at_twenty_points_leaves_the_former_bundle_serving(server, device, bundle, deploy):
    cut_at(POINTS, server, device, bundle, deploy, seed=int(time.time()))


def test_what_came_through_before_a_cut_does_not_travel_again(server, device, bundle, deploy):
    with cable(server.port) as way:
        device("pear", port=way.port)
        deploy(bundle("good"))
        fresh = bundle("fresh", payload=os.urandom(6_000_000))
        way.limit = way.carried + 5_000_000
        (one,) = deploy(fresh).devices
        assert one.outcome == "failed"
        way.limit, before = None, way.carried
        assert deploy(fresh).exit_code == 0
        # What was under way is lost with the connection: at most the two megabytes of SSH's window.
        assert way.carried - before < 4_000_000


def test_a_lost_connection_is_tried_again_by_itself(server, device, bundle, deploy):
    with cable(server.port) as way:
        pear = device("pear", port=way.port)
        deploy(bundle("good"))
        fresh = bundle("fresh", payload=os.urandom(600_000))
        limit = way.carried + 300_000
        way.limit = limit

        def mended(name: str, state: str, note: str) -> None:
            if "trying again" in note:
                way.limit = None

        summary = deploy(fresh, plan=FleetPlan(canary=0, retries=1), on_change=mended)
        assert summary.exit_code == 0, summary.devices
        assert pear.answers() == content(fresh)


def test_a_switch_that_goes_on_alone_is_waited_for_by_the_next_try(server, device, bundle, deploy, options):
    with cable(server.port) as way:
        pear = device("pear", port=way.port)
        deploy(bundle("good"))
        fresh = bundle("fresh", recipe="loads for 4 s")
        cuts: list[threading.Timer] = []

        def pull(name: str, state: str, note: str) -> None:
            if state == "switch" and not cuts:
                cuts.append(threading.Timer(0.5, way.cut))
                cuts[0].start()

        hasty = msgspec.structs.replace(options, lock_seconds=0.0)
        (one,) = deploy(fresh, options=hasty, plan=FleetPlan(retries=1), on_change=pull).devices
        assert one.outcome == "done", one.reason
        assert pear.answers() == content(fresh)


@pytest.mark.parametrize("step", ["lock", "upload", "finalize", "switch"])
def test_a_connection_that_falls_silent_keeps_no_device_locked(
    step, server, device, bundle, deploy, monkeypatch
):
    for place in ("connection", "ssh_options"):
        monkeypatch.setattr(f"edgeglm.deploy.{place}.ALIVE_SECONDS", 0.3, raising=False)
    with cable(server.port) as way:
        pear = device("pear", port=way.port)
        good = bundle("good")
        deploy(good)
        fresh = bundle("fresh", payload=os.urandom(4_000_000), recipe="finalize takes 2.5 s")

        def leave(name: str, state: str, note: str) -> None:
            if state == step:
                way.fall_silent()

        (one,) = deploy(fresh, on_change=leave).devices
        assert "run the same command again" in one.reason, one.reason
        assert pear.answers() in (content(good), content(fresh))
        (again,) = deploy(fresh).devices
        assert again.outcome == "done", again.reason
        assert pear.answers() == content(fresh)


@pytest.mark.parametrize("step", ["finalize", "switch"])
def test_a_cut_in_the_middle_of_a_step_is_mended_by_the_next_run(
    step, server, device, bundle, deploy, options
):
    with cable(server.port) as way:
        pear = device("pear", port=way.port)
        good = bundle("good")
        deploy(good)
        fresh = bundle("fresh", recipe="finalize takes 0.4 s")

        def pull(name: str, state: str, note: str) -> None:
            if state == step:
                way.limit = way.carried + 600

        (one,) = deploy(fresh, on_change=pull).devices
        assert one.outcome == "failed", one
        way.limit = None
        assert pear.answers() in (content(good), content(fresh))
        waiting = msgspec.structs.replace(options, lock_seconds=20.0)
        assert deploy(fresh, options=waiting).exit_code == 0
        assert pear.answers() == content(fresh)


def test_a_finalize_whose_agent_is_killed_writes_nothing_into_what_is_served_next(device, bundle, deploy):
    pear = device("pear")
    deploy(bundle("good"))

    def kill(name: str, state: str, note: str) -> None:
        if note == "finalize: fp32":  # the child is at work
            os.kill(json.loads((pear.root / "lock").read_bytes())["pid"], signal.SIGKILL)

    (one,) = deploy(bundle("slow", recipe="finalize takes 1.5 s"), on_change=kill).devices
    assert "run the same command again" in one.reason, one.reason
    fresh = bundle("fresh")
    assert deploy(fresh).exit_code == 0
    time.sleep(2)
    receipt = json.loads((pear.root / "current/bundle.finalized/receipt.json").read_bytes())
    assert receipt["content_digest"] == content(fresh) == pear.answers()


def test_a_switch_that_was_killed_is_judged_by_the_next_run(device, bundle, deploy):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    spare = pear.root / "slots/b"
    spare.mkdir()
    (spare / "slot.json").write_text('{"state": "staged"}')
    (pear.root / "switching.json").write_text('{"from": "a", "to": "b"}')
    (pear.root / "current").unlink()
    (pear.root / "current").symlink_to("slots/b")
    notes = []
    better = bundle("better")
    assert deploy(better, on_change=lambda *said: notes.append(said[2])).exit_code == 0
    assert any("had been cut off; the former one serves again" in note for note in notes)
    assert pear.answers() == content(better)
