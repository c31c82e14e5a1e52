from __future__ import annotations

import asyncio
from pathlib import Path

from edgeglm.runtime.config import RunnerConfig
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.metrics import Collector, HttpCounts, exposition
from edgeglm.serve.service import Service
from tests.engines.test_board import write
from tests.runtime.test_retrieval import colour_bundle, colour_engine

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


def scraped(bundle: Path, root: Path) -> str:
    async def ask() -> str:
        config = ServeConfig(runner=RunnerConfig(engine=colour_engine, when_full="shed"))
        async with Service(bundle, config) as service:
            return exposition(Collector(service, HttpCounts(), HttpCounts(), root=root)).decode()

    return asyncio.run(ask())


def test_an_operator_sees_heat_clocks_power_and_throttling_of_a_board(tmp_path: Path):
    bundle = colour_bundle(tmp_path / "colours")
    text = scraped(bundle, write(tmp_path / "board", FILES))
    for line in (
        'edgeglm_temperature_celsius{zone="cpu-thermal"} 48.5',
        'edgeglm_temperature_celsius{zone="gpu-thermal"} 51.25',
        'edgeglm_clock_megahertz{unit="gpu"} 1300.5',
        'edgeglm_power_milliwatts{rail="VDD_GPU_SOC"} 7600.0',
        'edgeglm_throttled{device="gpu-throttle-alert"} 1.0',
    ):
        assert line in text.splitlines()
    bare = scraped(bundle, tmp_path / "nothing")
    assert "edgeglm_temperature_celsius{" not in bare
    assert "edgeglm_power_milliwatts{" not in bare
    assert "edgeglm_ready 1.0" in bare
