from __future__ import annotations

from pathlib import Path

import pytest

from edgeglm.engines.board import Board, board_from_files, conditions, this_board


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "proc/meminfo": "MemTotal:       64341148 kB\nMemFree:  1000 kB\nMemAvailable:   50000000 kB\n",
    "etc/nv_tegra_release": (
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8\n"
    ),
    "etc/nvpmodel.conf": "< PARAM X=Y >\n< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=30W >\n",
    "var/lib/nvpmodel/status": "pmode:0002",
    "usr/src/tensorrt/bin/trtexec": "",
    "var/lib/dpkg/status": (
        "Package: libnvinfer-bin\nStatus: install ok installed\nVersion: 9.9.9\n\n"
        "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.5.2-1+cuda11.4\n\n"
        "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.3.0.30-1+cuda12.5\n"
    ),
}


def test_an_orin_is_known_by_its_files_alone(tmp_path: Path):
    board = board_from_files(write(tmp_path, ORIN))
    assert board.model == "NVIDIA Jetson AGX Orin Developer Kit"
    assert (board.machine, board.soc, board.sm, board.l4t) == ("aarch64", "tegra234", 87, "36.4.3")
    assert board.power_mode == "30W"
    assert (board.memory_bytes, board.memory_available_bytes) == (64341148 * 1024, 50000000 * 1024)
    assert board.trtexec_version == "10.3.0"
    assert board.trtexec == str(tmp_path / "usr/src/tensorrt/bin/trtexec")
    assert board.libraries == {}
    assert board.words.endswith("aarch64, SM 8.7, L4T 36.4.3")


@pytest.mark.parametrize(("chip", "sm"), [("tegra194", 72), ("tegra234", 87), ("tegra264", 110)])
def test_each_jetson_chip_gets_its_compute_capability(chip: str, sm: int, tmp_path: Path):
    write(tmp_path, {"proc/device-tree/compatible": f"nvidia,board\0nvidia,{chip}\0"})
    assert board_from_files(tmp_path).sm == sm


def test_a_laptop_has_no_jetson_about_it(tmp_path: Path):
    write(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name\t: Some CPU @ 2 GHz\n"})
    board = board_from_files(tmp_path)
    assert board.model == "Some CPU @ 2 GHz"
    assert (board.soc, board.l4t, board.sm, board.power_mode, board.trtexec) == (None,) * 5


def test_a_container_may_take_no_more_than_its_control_group_allows(tmp_path: Path):
    write(tmp_path, {**ORIN, "sys/fs/cgroup/memory.max": "2000000000\n"})
    write(tmp_path, {"sys/fs/cgroup/memory.current": "1500000000\n"})
    board = board_from_files(tmp_path)
    assert (board.memory_bytes, board.memory_available_bytes) == (2_000_000_000, 500_000_000)


def test_a_power_mode_without_a_name_is_still_told(tmp_path: Path):
    write(tmp_path, {"var/lib/nvpmodel/status": "pmode:0007"})
    assert board_from_files(tmp_path).power_mode == "mode 7"


def test_heat_clocks_and_power_are_read_where_they_are(tmp_path: Path):
    write(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/type": "tj-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "71500\n",
            "sys/class/thermal/thermal_zone1/type": "asleep\n",
            "sys/class/thermal/thermal_zone1/temp": "",
            "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
            "sys/class/thermal/cooling_device0/cur_state": "3\n",
            "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
            "sys/class/thermal/cooling_device1/cur_state": "1\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2201600\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000\n",
            "sys/class/hwmon/hwmon1/name": "ina3221\n",
            "sys/class/hwmon/hwmon1/in1_label": "VDD_GPU_SOC\n",
            "sys/class/hwmon/hwmon1/in1_input": "19000\n",
            "sys/class/hwmon/hwmon1/curr1_input": "500\n",
        },
    )
    here = conditions(tmp_path)
    assert here.temperatures_c == {"tj-thermal": 71.5}
    assert here.clocks_mhz == {"cpu0": 2201.6, "gpu": 1300.5}
    assert here.rails_mw == {"VDD_GPU_SOC": 9500.0}
    assert here.throttled == ("gpu-throttle-alert",)


def test_what_a_board_does_not_tell_is_absent_and_not_zero(tmp_path: Path):
    here = conditions(tmp_path)
    assert (here.temperatures_c, here.clocks_mhz, here.rails_mw, here.throttled) == ({}, {}, {}, ())


def test_this_machine_can_be_named():
    board = this_board()
    assert isinstance(board, Board)
    assert board.memory_bytes >= board.memory_available_bytes > 0
    assert "onnxruntime" in board.libraries
