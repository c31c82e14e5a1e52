"""Two devices and twenty, all behind one real server: canaries, limits, summaries that can be replayed."""

from __future__ import annotations

import io
import json
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import rich.console

from edgeglm.cli.console import App, Console
from edgeglm.cli.deploy import live_table
from edgeglm.core.errors import UserError
from edgeglm.core.store import Store, default_store_root
from edgeglm.deploy.evidence import evidence_in, timing_caches
from edgeglm.deploy.summary import FleetPlan, still_to_do, summary_bytes, summary_from_file
from tests.deploy.helpers import ORIN_NANO, content

GIVEN = ("--service", "process", "--port", "0", "--retries", "0", "--canary", "0")


def outcomes(summary) -> dict[str, str]:
    return {one.device: one.outcome for one in summary.devices}


def test_two_devices_are_served_the_same_bundle(device, bundle, deploy, inventory):
    pear, plum = device("pear"), device("plum")
    path = bundle()
    assert deploy(path, "pear", "plum", plan=FleetPlan()).exit_code == 0
    assert pear.answers() == plum.answers() == content(path)
    assert [one.name for one in inventory.devices()] == ["pear", "plum"]


def test_twenty_devices_are_served_and_never_more_at_once_than_allowed(device, bundle, deploy):
    names = [f"tree-{number:02}" for number in range(20)]
    trees = [device(name) for name in names]
    path = bundle()
    busy: set[str] = set()
    most = 0

    def watch(name: str, state: str, note: str) -> None:
        nonlocal most
        (busy.discard if state in ("waiting", "done", "failed") else busy.add)(name)
        most = max(most, len(busy))

    summary = deploy(path, *names, plan=FleetPlan(parallel=8), on_change=watch)
    assert summary.exit_code == 0, outcomes(summary)
    assert {tree.answers() for tree in trees} == {content(path)}
    assert 1 < most <= 8


def test_a_timing_cache_that_is_replaced_while_it_travels_travels_all_the_same(
    device, bundle, deploy, cli, tmp_path
):
    device("pear")
    deploy(bundle("one"), "pear")
    store, (row,) = Store(default_store_root()), json.loads(cli("devices", "--json"))
    (one,) = evidence_in(store)
    board: Any = SimpleNamespace(identity=row["kind"], l4t=row["kind"]["l4t"])
    links = timing_caches(store, board, tmp_path / "links")
    store.drop(one.key)
    assert sorted(path.name for path in links.values()) == ["engine.json", "timing.cache"]
    assert all(path.read_bytes() for path in links.values())
    assert timing_caches(store, board, tmp_path / "later") == {}


def test_a_canary_that_fails_spares_all_the_others(device, bundle, deploy):
    names = ["pear", "plum", "fig"]
    trees = [device(name) for name in names]
    good = bundle("good")
    assert deploy(good, *names).exit_code == 0
    summary = deploy(bundle("bad", recipe="dies"), *names, plan=FleetPlan(canary=1, max_failures=3))
    assert outcomes(summary) == {"pear": "failed", "plum": "skipped", "fig": "skipped"}
    assert "the canary failed" in summary.devices[1].reason
    assert summary.exit_code == 3
    assert {tree.answers() for tree in trees} == {content(good)}


def test_the_exit_code_is_the_highest_of_the_devices(sender, device, bundle, deploy, cli):
    device("pear")
    with (sender / ".ssh/config").open("a") as file:
        file.write("Host plum\n  HostName 127.0.0.1\n  Port 1\n")
    summary = deploy(
        bundle("bad", recipe="dies"), "plum", "pear", plan=FleetPlan(canary=0, max_failures=3, retries=0)
    )
    assert [one.exit_code for one in summary.devices] == [1, 3]
    assert summary.exit_code == 3
    assert "there is no edgeglm in" in cli("remove", "plum", "pear", "--root", "/nowhere", code=2)


def test_no_further_device_is_begun_once_enough_have_failed(sender, device, bundle, deploy):
    device("pear")
    names = ["off-1", "pear", "off-2", "off-3", "off-4"]
    with (sender / ".ssh/config").open("a") as file:
        file.writelines(f"Host {name}\n  HostName 127.0.0.1\n  Port 1\n" for name in names if "off" in name)
    summary = deploy(bundle(), *names, plan=FleetPlan(parallel=1, canary=0, max_failures=2, retries=0))
    assert [one.outcome for one in summary.devices] == ["failed", "done", "failed", "skipped", "skipped"]


def test_a_board_is_known_by_its_jetpack_and_tensorrt_and_by_why_it_is_silent(
    sender, device, bundle, deploy, options, cli, tmp_path
):
    package = "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.3.0.30-1+cuda12.5\n\n"
    for name, text in {**ORIN_NANO, "var/lib/dpkg/status": package}.items():
        place = tmp_path / "board" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    device("pear", EDGEGLM_DEVICE_FILES=str(tmp_path / "board"))
    assert deploy(bundle(), options=msgspec.structs.replace(options, any_board=True)).exit_code == 0
    (row,) = json.loads(cli("devices", "--refresh", "--json"))
    assert (row["jetpack"], row["tensorrt"], row["error"]) == ("6", "10.3.0", "")
    assert row["board"] == "NVIDIA Jetson Orin Nano Developer Kit, aarch64, SM 8.7, L4T 36.4.3"
    config = sender / ".ssh/config"
    config.write_text(config.read_text().replace("  Port ", "  Port 1\n  # "))
    with config.open("a") as file:
        file.write("Host plum\n  HostName 127.0.0.1\n  Port 1\n")
    words = cli("devices", "pear", "plum", "--refresh", "--json", code=1)
    pear, plum = json.JSONDecoder().raw_decode(words)[0]
    assert pear == {**row, "error": pear["error"]}, "as it was last seen"
    assert pear["error"].startswith("cannot reach pear: ")
    assert (plum["name"], plum["seen"]) == ("plum", 0.0)
    assert plum["error"].startswith("cannot reach plum: ")
    assert "cannot reach" not in cli("devices", "--json"), "it is of that one look"


def test_a_terminal_shows_all_devices_live_and_a_pipe_one_line_a_state():
    screen = io.StringIO()
    console = Console()
    console.err = rich.console.Console(file=screen, force_terminal=True, width=80)
    with live_table(App(console=console)) as on_change:
        on_change("pear", "upload", "1.0 of 2.0 MB")
        on_change("plum", "failed", "no space")
        time.sleep(0.3)  # it is drawn eight times a second
    assert "1.0 of 2.0 MB" in screen.getvalue()
    assert "plum" in screen.getvalue()
    pipe = io.StringIO()
    console = Console()
    console.err = rich.console.Console(file=pipe, width=80)
    with live_table(App(console=console)) as on_change:
        for note in ("1.0 of 2.0 MB", "2.0 of 2.0 MB"):
            on_change("pear", "upload", note)
        on_change("pear", "done", "")
    assert pipe.getvalue().splitlines() == ["pear: upload: 1.0 of 2.0 MB", "pear: done"]


def test_a_summary_is_replayed_for_those_that_were_not_done(device, bundle, cli, stub, tmp_path, sender):
    pear = device("pear")
    path = bundle()
    words = cli(
        "deploy", path, "pear", "plum", *GIVEN, "--python", stub, "--summary", tmp_path / "s.json", code=1
    )
    assert "1 of 2 devices done" in words
    assert "fp32, ONNX Runtime" in words, "what runs there, and on what evidence"
    assert pear.answers() == content(path)
    plum = device("plum")
    again = json.loads(cli("deploy", "--replay", tmp_path / "s.json", "--json"))
    assert [(one["device"], one["outcome"]) for one in again["devices"]] == [("plum", "done")]
    assert plum.answers() == content(path)


def test_a_replay_of_another_bundle_at_the_same_place_is_refused(device, bundle, cli, stub, tmp_path, sender):
    pear = device("pear")
    first = content(bundle())
    path = bundle()
    cli("deploy", path, "pear", "plum", *GIVEN, "--python", stub, "--summary", tmp_path / "s.json", code=1)
    device("plum")
    bundle(tower=b"another build")
    words = cli("deploy", "--replay", tmp_path / "s.json", code=2)
    assert "is another bundle now" in words
    assert pear.answers() == first
    bundle()
    assert "1 of 1 devices done" in cli("deploy", "--replay", tmp_path / "s.json")


def test_options_beside_a_replay_go_before_those_of_the_summary(
    device, bundle, deploy, cli, options, tmp_path, monkeypatch
):
    pear = device("pear")
    path = bundle()
    late = time.time() + 86_400
    monkeypatch.setattr("edgeglm.deploy.delivery.clock", lambda: late)
    deploy(path, summary_path=tmp_path / "s.json")
    before = summary_from_file(tmp_path / "s.json")
    assert "or pass --any-clock" in cli("deploy", "--replay", tmp_path / "s.json", code=2)
    cli("deploy", "--replay", tmp_path / "s.json", "--any-clock", "--summary", tmp_path / "again.json",
        "--retries", "3", "--stage")  # fmt: skip
    assert not (pear.root / "current").is_symlink()
    after = summary_from_file(tmp_path / "again.json")
    assert after.options == msgspec.structs.replace(before.options, any_clock=True, activate=False)
    assert after.plan == msgspec.structs.replace(before.plan, retries=3)
    replayed = ("deploy", "--replay", tmp_path / "s.json", "--any-clock", "--allow-unsigned", "--json")
    assert json.loads(cli(*replayed))["options"]["allow_unsigned"]


@pytest.mark.parametrize("place", ["nowhere/s.json", "."])
def test_a_summary_that_cannot_be_written_is_told_before_anything_is_deployed(
    place, device, bundle, cli, stub, tmp_path
):
    pear = device("pear")
    words = cli("deploy", bundle(), "pear", *GIVEN, "--python", stub, "--summary", tmp_path / place, code=2)
    assert "cannot write the summary" in words
    assert "name a file that can be written" in words
    assert not pear.root.exists()


def test_a_deploy_that_is_ended_in_the_middle_leaves_a_summary_to_go_on_from(
    device, bundle, deploy, tmp_path, cli
):
    trees = [device(name) for name in ("pear", "plum", "fig")]
    path = bundle()

    def end(name: str, state: str, note: str) -> None:
        if (name, state) == ("plum", "upload"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(
            path,
            *(tree.name for tree in trees),
            plan=FleetPlan(canary=1, parallel=1),
            on_change=end,
            summary_path=tmp_path / "s.json",
        )
    left = summary_from_file(tmp_path / "s.json")
    assert outcomes(left) == {"pear": "done", "plum": "skipped", "fig": "skipped"}
    assert (tmp_path / "s.json").stat().st_mode & 0o077 == 0
    assert "2 of 2 devices done" in cli("deploy", "--replay", tmp_path / "s.json")
    assert {tree.answers() for tree in trees} == {content(path)}


def test_a_summary_says_when_nothing_is_left(device, bundle, deploy, tmp_path):
    device("pear")
    summary = deploy(bundle())
    (tmp_path / "s.json").write_bytes(summary_bytes(summary))
    read = summary_from_file(tmp_path / "s.json")
    assert msgspec.to_builtins(read) == msgspec.to_builtins(summary)
    with pytest.raises(UserError, match="nothing is left to replay"):
        still_to_do(read)
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(UserError, match="give what --summary wrote"):
        summary_from_file(tmp_path / "s.json")
