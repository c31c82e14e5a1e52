"""A server that cron brings back after a reboot, in a table that keeps its other lines."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from scripts.fixtures.loopback import stop
from tests.deploy.helpers import content, only, program

CRONTAB = """case "$1" in
  -l) cat {table} 2>/dev/null || {{ echo no crontab >&2; exit 1; }} ;;
  -) cat >{table} ;;
esac
"""


@pytest.fixture
def crontab(tmp_path: Path) -> Path:
    """The table of a crontab program that keeps it in a file, below ``bin``; nobody's real one is touched."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/crontab", CRONTAB.format(table=tmp_path / "table"))
    return tmp_path / "table"


def test_a_reboot_brings_the_server_back_where_cron_keeps_it(device, bundle, deploy, options, cli, crontab):
    crontab.write_text("0 3 * * * backup\n")
    pear = device("pear", PATH=f"{crontab.parent / 'bin'}:{os.environ['PATH']}", EDGEGLM_STRANGER="50 %")
    mine = msgspec.structs.replace(options, service="cron")
    deploy(bundle("one"), options=mine)
    two = bundle("two")
    assert deploy(two, options=mine).exit_code == 0
    backup, line = crontab.read_text().splitlines()
    assert backup == "0 3 * * * backup", "other lines stay, and ours is there once"
    assert "STRANGER" not in line
    stop(pear)  # the power goes: its processes are gone, its files as they were
    command = line.removeprefix("@reboot ").replace(r"\%", "%")
    after = subprocess.Popen(
        ["/bin/sh", "-c", command], env={"HOME": str(pear.home), "PATH": "/usr/bin:/bin"}
    )
    try:
        assert pear.answers() == content(two)
        cli("rollback", "pear")
        assert after.wait(20) is not None, "a rollback ends what cron had started"
    finally:
        after.kill()
    assert pear.answers() != content(two)
    cli("remove", "pear")
    assert crontab.read_text() == "0 3 * * * backup\n"


def test_lines_of_a_crontab_stay_as_they_are_to_the_byte(device, bundle, deploy, options, cli, crontab):
    lines = b"# caf\xe9\n0 3 * * * backup \x0c \xc2\x85\n"
    crontab.write_bytes(lines)
    device("pear", PATH=f"{crontab.parent / 'bin'}:{os.environ['PATH']}")
    (one,) = deploy(bundle(), options=msgspec.structs.replace(options, service="cron")).devices
    assert one.outcome == "done", one.reason
    assert crontab.read_bytes().startswith(lines + b"@reboot ")
    cli("remove", "pear")
    assert crontab.read_bytes() == lines


def test_another_way_of_service_ends_the_former_one(device, bundle, deploy, options, crontab):
    pear = device("pear", PATH=f"{crontab.parent / 'bin'}:{os.environ['PATH']}")
    deploy(bundle("one"), options=msgspec.structs.replace(options, service="cron"))
    former = json.loads((pear.root / "run/state.json").read_bytes())["pid"]
    two = bundle("two")
    assert deploy(two).exit_code == 0
    assert crontab.read_text() == ""
    assert not Path(f"/proc/{former}/stat").exists() or b") Z" in Path(f"/proc/{former}/stat").read_bytes()
    assert pear.answers() == content(two)


def test_cron_is_refused_in_words_where_there_is_none(device, bundle, deploy, options, tmp_path):
    path = only(tmp_path / "without", python3=sys.executable, dirname=shutil.which("dirname"))
    device("pear", PATH=path)
    (one,) = deploy(bundle(), options=msgspec.structs.replace(options, service="cron")).devices
    assert "there is no crontab on the device" in one.reason
