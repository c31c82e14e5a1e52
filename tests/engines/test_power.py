"""If these fail, a receipt's joules are not what the board used."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.engines.board import rails_mw
from edgeglm.engines.power import PowerWatch, energy_of
from edgeglm.engines.tegrastats import rails_from_tegrastats

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


# In the form that the boards print; the figures are ours, no board was at hand.
LINES = {
    "Xavier, L4T 32": (
        "RAM 2722/31918MB (lfb 6716x4MB) SWAP 0/15959MB (cached 0MB) CPU [1%@1190,0%@1190,off,off] "
        "EMC_FREQ 0% GR3D_FREQ 0% AO@36C GPU@36C PMIC@100C GPU 155/120 CPU 310/310 SOC 931/931 "
        "CV 0/0 VDDRQ 155/155 SYS5V 1526/1526",
        {"GPU": 155, "CPU": 310, "SOC": 931, "CV": 0, "VDDRQ": 155, "SYS5V": 1526},
    ),
    "Xavier, L4T 35": (
        "11-24-2026 09:00:00 RAM 2722/31002MB (lfb 6x4MB) CPU [1%@1190] GR3D_FREQ 0% GPU@36C "
        "GPU 0mW/0mW CPU 465mW/465mW SOC 1242mW/1242mW CV 0mW/0mW VDDRQ 155mW/155mW SYS5V 2760mW/2760mW",
        {"GPU": 0, "CPU": 465, "SOC": 1242, "CV": 0, "VDDRQ": 155, "SYS5V": 2760},
    ),
    "AGX Orin, L4T 36": (
        "11-24-2026 09:00:00 RAM 1205/30623MB (lfb 64x4MB) SWAP 0/15311MB (cached 0MB) CPU [0%@729,off] "
        "EMC_FREQ 0%@204 GR3D_FREQ 9%@[114,114] VIC_FREQ 729 APE 233 CV0@-256C cpu@43.5C "
        "VDD_GPU_SOC 4788mW/4700mW VDD_CPU_CV 798mW/798mW VIN_SYS_5V0 3842mW/3842mW NC 0mW/0mW "
        "VDDQ_VDD2_1V8AO 707mW/707mW NC 0mW/0mW",
        {"VDD_GPU_SOC": 4788, "VDD_CPU_CV": 798, "VIN_SYS_5V0": 3842, "VDDQ_VDD2_1V8AO": 707},
    ),
    "Orin Nano, L4T 39": (
        "11-24-2026 09:00:00 RAM 5739/7546MB (lfb 1x2MB) CPU [72%@1728] GR3D_FREQ 33% cpu@50C/50C "
        "VDD_IN 9761mW/9700mW/9900mW VDD_CPU_GPU_CV 4238mW/4238mW/4238mW VDD_SOC 1825mW/1825mW/1825mW",
        {"VDD_IN": 9761, "VDD_CPU_GPU_CV": 4238, "VDD_SOC": 1825},
    ),
    "Thor, L4T 38": (
        "11-24-2026 09:00:00 RAM 8690/125772MB (lfb 368x4MB) CPU [12%@972,off] tj@39.906C soc012@38.812C "
        "VDD_GPU 3561mW/3561mW VDD_CPU_SOC_MSS 7910mW/7910mW VIN_SYS_5V0 7620mW/7620mW VIN 26686mW/26686mW",
        {"VDD_GPU": 3561, "VDD_CPU_SOC_MSS": 7910, "VIN_SYS_5V0": 7620, "VIN": 26686},
    ),
}


@pytest.mark.parametrize(("line", "rails"), LINES.values(), ids=LINES)
def test_the_present_power_of_each_rail_is_read_as_each_release_prints_it(line: str, rails: dict[str, int]):
    assert rails_from_tegrastats(line) == rails


@given(st.text())
def test_no_line_crashes_the_reader(line: str) -> None:
    assert all(power >= 0 for power in rails_from_tegrastats(line).values())


def test_a_board_without_sensor_files_is_measured_by_tegrastats(tmp_path: Path) -> None:
    program = tmp_path / "tegrastats"
    program.write_text(
        "#!/bin/sh\n[ \"$1 $2\" = '--interval 20' ] || exit 1\n"
        "while :; do echo 'CPU [1%@729] VDD_IN 5000mW/4000mW'; sleep 0.02; done\n"
    )
    program.chmod(0o755)
    watch = PowerWatch(tmp_path, every=0.02, tegrastats=str(program))
    with watch.watching():
        deadline = time.monotonic() + 20
        while len(watch._samples) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    energy = watch.energy
    assert energy is not None
    assert (energy.source, energy.interval_s) == ("tegrastats", 0.02)
    assert energy.samples >= 4
    assert energy.joules["VDD_IN"] == pytest.approx(5 * energy.seconds, rel=0.1, abs=0.005)


def test_a_tegrastats_that_does_not_start_measures_nothing(tmp_path: Path) -> None:
    watch = PowerWatch(tmp_path, tegrastats=str(tmp_path / "absent"))
    with watch.watching():
        pass
    assert watch.energy is None


def test_the_sensor_of_a_whole_thor_tells_its_power_itself(tmp_path: Path) -> None:
    folder = sensor(tmp_path, 1_000) / "sys/class/hwmon/hwmon4"
    folder.mkdir()
    (folder / "name").write_text("ina238\n")
    (folder / "power1_input").write_text("26686000\n")
    assert rails_mw(tmp_path) == {"VDD_GPU_SOC": 19_000.0, "ina238 power1": 26_686.0}
