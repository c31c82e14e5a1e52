"""If these fail, an operator of a board without sensor files sees no heat and no power, or a wrong one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.engines.tegrastats import Sensors, line_of, temperatures_from_tegrastats
from tests.engines.test_board import write
from tests.engines.test_power import LINES

HEAT = {
    "Xavier, L4T 32": {"AO": 36, "GPU": 36, "PMIC": 100},
    "Xavier, L4T 35": {"GPU": 36},
    "AGX Orin, L4T 36": {"cpu": 43.5},  # CV0 is switched off
    "Orin Nano, L4T 39": {"cpu": 50},
    "Thor, L4T 38": {"tj": 39.906, "soc012": 38.812},
}


def stand_in(folder: Path, line: str, *, pause: float = 0.02) -> Path:
    """Write a tegrastats that says one line again and again."""
    program = folder / "bin" / "tegrastats"
    program.parent.mkdir()
    program.write_text(
        f"#!/bin/sh\n[ \"$1 $2\" = '--interval 100' ] || exit 1\n"
        f"echo x >> '{folder}/runs'\nwhile :; do sleep {pause}; echo '{line}'; done\n"
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("release", HEAT)
def test_each_zone_is_read_as_each_release_prints_it(release: str):
    assert temperatures_from_tegrastats(LINES[release][0]) == HEAT[release]


@given(st.text())
def test_no_line_crashes_the_reader(line: str):
    assert all(degrees > -200 for degrees in temperatures_from_tegrastats(line).values())


def test_a_board_without_sensor_files_tells_heat_and_power_through_it(tmp_path: Path):
    program = stand_in(tmp_path, LINES["Thor, L4T 38"][0])
    now = [100.0]
    sensors = Sensors(tmp_path / "board", tegrastats=str(program), clock=lambda: now[0])
    found = sensors.read()
    assert found.temperatures_c == {"tj": 39.906, "soc012": 38.812}
    assert found.rails_mw["VIN"] == 26686.0
    now[0] += 0.5
    assert sensors.read() == found
    assert (tmp_path / "runs").read_text() == "x\n", "who scrapes often starts no program each time"
    now[0] += 1.0
    sensors.read()
    assert (tmp_path / "runs").read_text() == "x\nx\n"


def test_what_the_files_say_is_not_asked_of_it(tmp_path: Path):
    program = stand_in(tmp_path, "tj@39.9C VDD_IN 5000mW/4000mW")
    zone = "sys/class/thermal/thermal_zone0"
    root = write(tmp_path / "board", {f"{zone}/type": "cpu-thermal\n", f"{zone}/temp": "48500\n"})
    found = Sensors(root, tegrastats=str(program)).read()
    assert found.temperatures_c == {"cpu-thermal": 48.5}
    assert found.rails_mw == {"VDD_IN": 5000.0}


def test_one_that_does_not_start_or_says_nothing_leaves_it_absent(tmp_path: Path):
    found = Sensors(tmp_path, tegrastats=str(tmp_path / "absent")).read()
    assert (found.temperatures_c, found.rails_mw) == ({}, {})
    silent = stand_in(tmp_path, "VDD_IN 5000mW/4000mW", pause=600)
    began = time.monotonic()
    assert line_of(str(silent), wait=0.2) == ""
    assert time.monotonic() - began < 5
