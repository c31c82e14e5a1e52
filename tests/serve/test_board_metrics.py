from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeglm.engines import board
from edgeglm.engines.board import Conditions
from edgeglm.engines.cuda_devices import CudaDevice
from edgeglm.engines.nvml import gpu_reading
from edgeglm.engines.tegrastats import Sensors
from edgeglm.runtime.config import RunnerConfig
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.metrics import Collector, HttpCounts, exposition
from edgeglm.serve.service import Service
from scripts.fixtures.colours import colour_bundle, colour_engine
from tests.engines.test_board import write
from tests.engines.test_nvml import BUS, library
from tests.engines.test_tegrastats import stand_in
from tests.serve.asking import asked
from tests.serve.conftest import running, serve_command

__all__ = ["library"]  # a fixture

# as an Orin's kernel has them: degrees in thousandths, hertz, millivolts, milliamperes
FILES = {
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48500\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "51250\n",
    "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device0/cur_state": "1\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
    "sys/class/hwmon/hwmon3/in1_input": "19000\n",
    "sys/class/hwmon/hwmon3/curr1_input": "400\n",
}


def scraped(bundle: Path, seen: Conditions) -> str:
    async def ask() -> str:
        config = ServeConfig(runner=RunnerConfig(engine=colour_engine, when_full="shed"))
        async with Service(bundle, config) as service:
            return exposition(Collector(service, HttpCounts(), HttpCounts(), seen)).decode()

    return asyncio.run(ask())


def test_an_operator_sees_heat_clocks_power_and_throttling_of_a_board(tmp_path: Path):
    bundle = colour_bundle(tmp_path / "colours")
    text = scraped(bundle, Sensors(write(tmp_path / "board", FILES)).read())
    for line in (
        'edgeglm_temperature_celsius{zone="cpu-thermal"} 48.5',
        'edgeglm_temperature_celsius{zone="gpu-thermal"} 51.25',
        'edgeglm_clock_megahertz{unit="gpu"} 1300.5',
        'edgeglm_power_milliwatts{rail="VDD_GPU_SOC"} 7600.0',
        'edgeglm_throttled{device="gpu-throttle-alert"} 1.0',
    ):
        assert line in text.splitlines()
    assert 'rail="GPU"' not in text, "the files of another board say nothing of this machine's GPU"
    bare = scraped(bundle, Sensors(tmp_path / "nothing").read())
    assert "edgeglm_temperature_celsius{" not in bare
    assert "edgeglm_power_milliwatts{" not in bare
    assert "edgeglm_ready 1.0" in bare


def test_an_operator_sees_heat_clocks_and_power_of_a_discrete_gpu(
    library: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a100 = CudaDevice(name="A100", sm=80, memory_bytes=80 << 30, bus_id=BUS)
    bundle = colour_bundle(tmp_path / "colours")
    monkeypatch.setattr(board, "cuda_devices", lambda: (a100,))
    for power, told in ((0, True), (1, False)):
        place = library(no_power=power)
        monkeypatch.setattr(board, "gpu_reading", lambda bus, place=place: gpu_reading(bus, library=place))
        text = scraped(bundle, Sensors().read())
        assert 'edgeglm_temperature_celsius{zone="gpu"} 61.0' in text
        assert 'edgeglm_clock_megahertz{unit="gpu"} 1410.0' in text
        assert 'edgeglm_throttled{device="power cap"} 1.0' in text
        assert ('edgeglm_power_milliwatts{rail="GPU"} 251000.0' in text) == told


def test_a_server_on_a_board_without_sensor_files_asks_tegrastats(bundles: Path, tmp_path: Path):
    program = stand_in(tmp_path, "CPU [1%@729] tj@39.9C VDD_IN 5000mW/4000mW")
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    with running(tmp_path / "log", serve_command(bundles / "colours", "--no-grpc"), PATH=path) as server:
        text = asked(server, "GET", "/metrics")[2].decode()
    assert "edgeglm_power_milliwatts{" in text
    assert "edgeglm_temperature_celsius{" in text
