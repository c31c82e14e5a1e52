"""If these fail, a receipt's joules are not what the board used."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.engines.power import PowerWatch, energy_of

WATTS = st.floats(0, 60, allow_nan=False)


def sensor(root: Path, milliamperes: int) -> Path:
    """Write an INA3221 as JetPack shows it: 19 V on the rail of the whole board."""
    folder = root / "sys/class/hwmon/hwmon3"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "name": "ina3221\n",
        "in1_label": "VDD_GPU_SOC\n",
        "in1_input": "19000\n",
        "curr1_input": f"{milliamperes}\n",
        "in2_label": "NC\n",
    }.items():
        (folder / name).write_text(text)
    return root


def test_the_integral_is_that_of_a_pencil() -> None:
    samples = [(0.0, {"VDD_IN": 10_000.0}), (2.0, {"VDD_IN": 20_000.0}), (3.0, {"VDD_IN": 20_000.0})]
    energy = energy_of(samples)
    assert energy is not None
    assert (energy.joules, energy.seconds, energy.samples) == ({"VDD_IN": 50.0}, 3.0, 3)


@given(st.lists(st.tuples(st.floats(0.01, 5), WATTS), min_size=2, max_size=20))
def test_energy_lies_between_the_least_and_the_most_power_held_all_along(steps: list[tuple[float, float]]):
    now, samples = 0.0, []
    for pause, watts in steps:
        now += pause
        samples.append((now, {"VDD_IN": watts * 1e3}))
    energy = energy_of(samples)
    assert energy is not None
    seconds, powers = samples[-1][0] - samples[0][0], [watts for _, watts in steps]
    assert min(powers) * seconds - 1e-3 <= energy.joules["VDD_IN"] <= max(powers) * seconds + 1e-3


def test_a_rail_that_was_not_always_read_is_left_out_and_no_rail_is_no_measurement() -> None:
    found = energy_of([(0.0, {"A": 1e3, "B": 1e3}), (1.0, {"A": 1e3})])
    assert found is not None
    assert found.joules == {"A": 1.0}
    assert energy_of([(0.0, {"A": 1e3})]) is None
    assert energy_of([(0.0, {}), (1.0, {})]) is None


def test_a_board_is_sampled_while_it_works(tmp_path: Path) -> None:
    watch = PowerWatch(sensor(tmp_path, 1_000), every=0.01)
    with watch.watching():
        deadline = time.monotonic() + 5
        while len(watch._samples) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    energy = watch.energy
    assert energy is not None
    assert energy.samples >= 5
    assert energy.joules["VDD_GPU_SOC"] == pytest.approx(19 * energy.seconds, rel=0.02)
    with watch.watching():
        pass
    assert watch.energy is not None
    assert watch.energy.samples == 2, "a second stretch begins anew"


def test_a_machine_without_sensors_measures_nothing(tmp_path: Path) -> None:
    watch = PowerWatch(tmp_path)
    with watch.watching():
        pass
    assert watch.energy is None
