"""How a bundle is served is part of the switch: what is refused or undone leaves it as it was."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest

from edgeglm.cli.console import App
from edgeglm.cli.deploy import print_rows
from edgeglm.deploy.options import token_file_of
from tests.deploy.helpers import content, only, program, reason


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings(device) -> dict[str, object]:
    found: dict[str, object] = json.loads((device.root / "device.json").read_bytes())
    return found


def served_at(device) -> tuple[str, int]:
    state = json.loads((device.root / "run/state.json").read_bytes())
    return state["pid"], state["port"]


def test_a_port_that_is_in_use_is_refused_and_the_former_server_never_stops(device, bundle, deploy, options):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    before, where = settings(pear), served_at(pear)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = reason(deploy(bundle("other"), options=msgspec.structs.replace(options, port=port)))
    assert f"the device cannot listen on 127.0.0.1:{port}: Address already in use" in words
    assert words.endswith("or pass another --port or --host")
    assert served_at(pear) == where
    assert pear.answers() == content(good)
    assert settings(pear) == before


def test_a_deploy_says_with_what_the_former_one_was_served_and_this_one_is_not(
    device, bundle, deploy, options, capsys
):
    device("pear")
    first, second = free_port(), free_port()
    former = msgspec.structs.replace(options, port=first, serve_flags=("--queue=7",))
    assert deploy(bundle("good"), options=former).devices[0].delivered.dropped == ()
    again = deploy(bundle("same"), options=former).devices[0].delivered
    assert again.dropped == (), "all of it was said again"
    summary = deploy(bundle("other"), options=msgspec.structs.replace(options, port=second))
    words = f"--port={first}", "--serve-flag=--queue=7"
    assert summary.devices[0].delivered.dropped == words
    print_rows(App(), summary)
    told = f"is served otherwise than before; deploy again with {' '.join(words)} to keep that"
    assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-name.invalid"])
def test_an_address_that_is_not_the_devices_is_refused(host, device, bundle, deploy, options):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    words = reason(deploy(bundle("other"), options=msgspec.structs.replace(options, host=host)))
    assert f"the device cannot listen on {host}" in words
    assert pear.answers() == content(good)


def test_a_port_taken_after_the_look_brings_the_former_server_back_on_its_own(
    device, bundle, deploy, options
):
    pear = device("pear")
    good = bundle("good")
    first, second = free_port(), free_port()
    deploy(good, options=msgspec.structs.replace(options, port=first))
    taken = socket.socket()

    def take(name: str, state: str, note: str) -> None:
        if state == "finalize" and not note:
            taken.bind(("127.0.0.1", second))
            taken.listen()

    try:
        mine = msgspec.structs.replace(options, port=second, ready_seconds=30)
        words = reason(deploy(bundle("other"), options=mine, on_change=take), code=3)
    finally:
        taken.close()
    assert "the former one serves again" in words
    assert pear.answers() == content(good)
    assert served_at(pear)[1] == settings(pear)["port"] == first


def test_an_address_of_ipv6_stands_in_brackets(device, bundle, deploy, options, inventory):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("NOT ALLOWED HERE: this machine has no IPv6 loopback; nothing was tested")
    device("pear")
    (one,) = deploy(bundle(), options=msgspec.structs.replace(options, host="::1")).devices
    assert one.outcome == "done", one.reason
    (seen,) = inventory.devices()
    assert one.delivered.url == seen.url
    with urllib.request.urlopen(seen.url, timeout=5) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls-certificate=/a.pem", "--tls-key=/b.pem"], "end TLS in a proxy before it"),
        (["--no-grcp"], "No such option '--no-grcp'"),
        (["--threads=none"], "see edgeglm serve --help"),
        (["--token-file"], "see edgeglm serve --help"),
        (["other-bundle"], "see edgeglm serve --help"),
        (["--port=9"], "pass --port in place of --serve-flag"),
        (["--when-told"], "leave that --serve-flag out"),
        (["--help"], "run 'edgeglm serve --help' here"),
    ],
)
def test_flags_that_the_server_could_not_get_ready_with_are_refused_before_anything_is_done(
    flags, words, device, bundle, cli
):
    pear = device("pear")
    given = [f"--serve-flag={flag}" for flag in flags]
    assert words in cli("deploy", bundle(), "pear", *given, code=2)
    assert not pear.root.exists()


def test_flags_that_the_server_takes_are_handed_on(device, bundle, cli, stub):
    pear = device("pear")
    flags = ["--threads=1", "--no-page", "--json", "--allow-downgrade"]
    given = [f"--serve-flag={flag}" for flag in flags]
    cli("deploy", bundle(), "pear", "--service", "process", "--port", 0, "--python", stub, *given)
    assert pear.record()["serve_flags"][:4] == flags


def test_the_same_port_again_is_no_port_in_use(device, bundle, deploy, options):
    pear = device("pear")
    mine = msgspec.structs.replace(options, port=free_port())
    deploy(bundle("one"), options=mine)
    two = bundle("two")
    assert deploy(two, options=mine).exit_code == 0
    assert pear.answers() == content(two)


def test_a_refused_deploy_leaves_the_settings_of_what_serves(device, bundle, deploy, options, cli):
    pear = device("pear")
    port = free_port()
    deploy(bundle("good"), options=msgspec.structs.replace(options, port=port))
    before = settings(pear)
    assert deploy(bundle("bad", recipe="wrong answers"), options=options).exit_code == 3
    assert settings(pear) == before
    (row,) = json.loads(cli("devices", "--refresh", "--json"))
    assert (row["ready"], row["url"]) == (True, f"http://127.0.0.1:{port}")


def test_a_staged_bundle_changes_no_settings(device, bundle, deploy, options):
    pear = device("pear")
    port = free_port()
    deploy(bundle("good"), options=msgspec.structs.replace(options, port=port))
    before = settings(pear)
    staged = msgspec.structs.replace(options, port=8000, service="auto", activate=False)
    assert deploy(bundle("staged"), options=staged).exit_code == 0
    assert settings(pear) == before
    assert not (pear.root / "previous").is_symlink()


def test_a_rollback_goes_back_to_the_address_of_the_former_bundle(device, bundle, deploy, options, cli):
    pear = device("pear")
    one, first, second = bundle("one"), free_port(), free_port()
    deploy(one, options=msgspec.structs.replace(options, port=first))
    deploy(bundle("two"), options=msgspec.structs.replace(options, port=second))
    assert settings(pear)["port"] == second
    cli("rollback", "pear")
    assert pear.answers() == content(one)
    assert settings(pear)["port"] == served_at(pear)[1] == first


def test_a_service_that_is_not_there_is_refused_and_the_former_server_never_stops(
    device, bundle, deploy, options, tmp_path
):
    pear = device(
        "pear", PATH=only(tmp_path / "bin", python3=sys.executable, dirname=shutil.which("dirname"))
    )
    good = bundle("good")
    deploy(good)
    before, where = settings(pear), served_at(pear)
    words = reason(deploy(bundle("other"), options=msgspec.structs.replace(options, service="user")))
    assert words == "there is no systemctl on the device; pass --service process"
    assert (served_at(pear), settings(pear)) == (where, before)
    assert not (pear.root / "switching.json").exists()
    third = bundle("third")
    assert deploy(third).exit_code == 0, "what was refused stands in no later deploy's way"
    assert pear.answers() == content(third)


SYSTEMCTL = """echo "$@" >>{folder}/calls
[ -e {folder}/$2 ] && {{ echo "$2 is broken here" >&2; exit 1; }}
exit 0
"""


@pytest.fixture
def systemctl(tmp_path: Path) -> Path:
    """A folder with a systemctl that fails in each verb a file is named after."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name in ("systemctl", "loginctl"):
        program(folder / name, SYSTEMCTL.format(folder=folder))
    return folder


@pytest.mark.parametrize("verb", ["show-environment", "daemon-reload", "enable", "restart"])
def test_a_systemd_that_fails_anywhere_leaves_the_former_bundle_served(
    verb, device, bundle, deploy, options, systemctl
):
    (systemctl / verb).touch()
    pear = device("pear", PATH=f"{systemctl}:{os.environ['PATH']}")
    good = bundle("good")
    deploy(good)
    before, where = settings(pear), served_at(pear)
    mine = msgspec.structs.replace(options, service="user")
    words = reason(deploy(bundle("other"), options=mine), code=2 if verb == "show-environment" else 3)
    assert f"{verb} is broken here" in words
    assert pear.answers() == content(good)
    assert settings(pear) == before
    assert not (pear.root / "switching.json").exists()
    if verb != "restart":
        assert served_at(pear) == where, "it never stopped"
    assert not list(pear.home.rglob("edgeglm.service")), "no unit is left behind"


def test_a_unit_that_never_gets_ready_is_taken_away_and_the_former_process_comes_back(
    device, bundle, deploy, options, systemctl
):
    pear = device("pear", PATH=f"{systemctl}:{os.environ['PATH']}")
    good = bundle("good")
    deploy(good)
    mine = msgspec.structs.replace(options, service="user", ready_seconds=1.0)
    words = reason(deploy(bundle("other"), options=mine), code=3)
    assert "it did not answer within 1 s" in words
    assert "the former one serves again" in words
    assert pear.answers() == content(good)
    assert settings(pear)["service"] == "process"
    assert not list(pear.home.rglob("edgeglm.service"))
    assert "--user disable --now edgeglm.service" in (systemctl / "calls").read_text().splitlines()


def test_a_switch_of_service_that_was_killed_goes_back_to_the_former_service(device, bundle, deploy, options):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    before = settings(pear)
    spare = pear.root / "slots/b"
    spare.mkdir()
    (spare / "slot.json").write_text('{"state": "staged", "objects": []}')
    after = {**before, "service": "user", "port": 1}
    (pear.root / "switching.json").write_text(
        json.dumps({"from": "a", "to": "b", "before": before, "after": after})
    )
    (pear.root / "device.json").write_text(json.dumps(after))
    (pear.root / "current").unlink()
    (pear.root / "current").symlink_to("slots/b")
    notes = []
    (one,) = deploy(
        bundle("bad", recipe="wrong answers"), on_change=lambda *said: notes.append(said[2])
    ).devices
    assert any("had been cut off; the former one serves again" in note for note in notes)
    assert one.outcome == "failed"
    assert settings(pear) == before
    assert pear.answers() == content(good)


@pytest.mark.parametrize("place", ["token", "/nowhere/token"])
def test_a_token_that_is_not_there_is_refused_before_anything_is_sent(place, device, bundle, deploy, options):
    pear = device("pear")
    mine = msgspec.structs.replace(options, serve_flags=("--token-file", place))
    words = reason(deploy(bundle(), options=mine))
    assert (
        f"there is no token file {place} on the device that this user can read; write the token there"
        in words
    )
    assert not list((pear.root / "objects").iterdir())


@pytest.mark.parametrize(
    ("flags", "file"),
    [
        ((), None),
        (("--no-page", "--token-file=/a=b"), "/a=b"),
        (("--token-file", "/a", "--no-page"), "/a"),
        (("--token-file=/a", "--token-file", "/b"), "/b"),
        (("--token-file",), None),
    ],
)
def test_the_token_file_is_read_from_the_servers_flags(flags, file):
    assert token_file_of(flags) == file
