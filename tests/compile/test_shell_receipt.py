"""What the shell finalize reads and says of a board, and how it ends where it cannot go on."""

from __future__ import annotations

import fcntl
import importlib.resources
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeglm.compile.by_trtexec import TrtexecReceipt
from edgeglm.compile.owner import alone
from edgeglm.core.errors import UserError
from edgeglm.engines.board import board_from_files, conditions
from edgeglm.engines.power import Energy
from tests.compile.shell_board import ORIN, TRTEXEC, XAVIER, board, receipt_of, run, with_shell


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_neighbours_are_compared_as_at_home(shell: str, tmp_path: Path, require_system: Callable[[str], str]):
    found = require_system(shell)
    random = np.random.default_rng(3)
    gallery, kept = random.normal(size=(40, 16)), random.normal(size=(5, 16))
    made = kept + random.normal(size=kept.shape)
    (tmp_path / "gallery").mkdir()
    np.save(tmp_path / "gallery/rows.npy", gallery.astype(np.float32))
    offset = (tmp_path / "gallery/rows.npy").stat().st_size - gallery.size * 4
    near = np.argsort(-(kept @ gallery[:30].T), axis=1)[:, :10]
    here = np.argsort(-(made @ gallery[:30].T), axis=1)[:, :10]
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(near.tolist(), here.tolist(), strict=True)]
    lines = [f"{offset} 30 16 gallery/rows.npy", *(" ".join(map(str, row)) for row in near.tolist())]
    (tmp_path / "near").write_text("\n".join([*lines, ""]))
    (tmp_path / "actual").write_text("\n".join(f"{value:.8g}" for value in made.reshape(-1)) + "\n")
    script = importlib.resources.files("edgeglm.compile") / "finalize.sh"
    function = (
        "agreement() {" + script.read_text("utf-8").split("\nagreement() {")[1].split("\n}\n")[0] + "\n}\n"
    )
    command = [
        found,
        *(["sh"] if shell == "busybox" else []),
        "-euc",
        function + 'here=. agreement "$@"',
        "sh",
    ]
    done = subprocess.run(
        [*command, "actual", "near"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert 0.1 < float(done.stdout) < 0.95
    assert float(done.stdout) == pytest.approx(np.mean(shares), abs=1e-4)
    (tmp_path / "actual").write_text("1\n2\n")
    done = subprocess.run(
        [*command, "actual", "near"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "-1", "an output of another size agrees with nothing"


TEGRASTATS = """#!/bin/sh
while :; do
  echo "RAM 1/2MB VDD_GPU_SOC 1000mW/900mW VDD_IN 5000mW/4000mW NC 0mW/0mW"
  sleep 0.01
done
"""


@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_the_receipt_says_what_timing_took_where_the_board_tells(
    shell: str, tmp_path: Path, require_system: Callable[[str], str]
):
    found = require_system(shell)
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    assert run(bundle, root, shell=found).returncode == 0
    assert receipt_of(bundle)["energy"] is None, "nothing measured is not nothing used"
    (root / "usr/bin").mkdir()
    (root / "usr/bin/tegrastats").write_text(TEGRASTATS)
    (root / "usr/bin/tegrastats").chmod(0o755)
    slow = TRTEXEC.replace('onnx="$(cat', 'sleep 0.1\nonnx="$(cat')
    (root / "usr/src/tensorrt/bin/trtexec").write_text(slow)
    assert run(bundle, root, shell=found).returncode == 0
    energy = msgspec.convert(receipt_of(bundle)["energy"], Energy)
    assert energy.source == "tegrastats"
    assert energy.samples >= 4
    assert energy.joules.keys() == {"VDD_GPU_SOC", "VDD_IN"}
    assert energy.joules["VDD_IN"] == pytest.approx(5.0 * energy.samples * 0.1)
    assert energy.joules["VDD_GPU_SOC"] == pytest.approx(energy.joules["VDD_IN"] / 5)


def test_an_altered_file_a_foreign_board_and_a_small_one_are_refused(tmp_path: Path):
    bundle = with_shell(tmp_path, target="jetson-agx-orin-64gb")
    root = board(tmp_path / "root", ORIN)
    foreign = run(bundle, board(tmp_path / "other", XAVIER))
    assert foreign.returncode == 2
    assert (
        "this is A tegra194 board (SM 72); the bundle is for jetson-agx-orin-64gb (SM 87)" in foreign.stderr
    )
    old = run(bundle, board(tmp_path / "other", XAVIER), "--any-board")
    assert "takes lane A, of which the bundle has nothing" in old.stderr
    small = run(bundle, board(tmp_path / "small", ORIN, free_kb=100_000))
    assert (small.returncode, "building needs 300 MB and 97 MB are free" in small.stderr) == (2, True)
    model = bundle / "models/int8/text.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes() + b"x")
    altered = run(bundle, root)
    assert (altered.returncode, "was altered or cut off" in altered.stderr) == (2, True)
    assert not (root / "calls").exists(), "nothing is built of what was altered"


SENSORS = {
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_15W >\n",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:cool",
    "sys/class/thermal/thermal_zone0/type": "CPU-therm\n",
    "sys/class/thermal/thermal_zone0/temp": "41500\n",
    "sys/class/thermal/thermal_zone1/type": "asleep\n",
    "sys/class/thermal/thermal_zone1/temp": "",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "thermal-cpufreq-0\n",
    "sys/class/thermal/cooling_device1/cur_state": "2\n",
    "sys/class/thermal/cooling_device2/type": "gpu-balanced\n",
    "sys/class/thermal/cooling_device2/cur_state": "0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2265600\n",
    "sys/class/devfreq/15340000.vic/cur_freq": "115200000\n",
    "sys/class/devfreq/17000000.gv11b/cur_freq": "1377000000\n",
}


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_the_receipt_of_a_xavier_says_under_what_conditions_it_was_timed(
    shell: str, tmp_path: Path, require_system: Callable[[str], str]
):
    """It is the only receipt that a Xavier gets, and must say what edgeglm's own reader says."""
    found = require_system(shell)
    bundle, root = with_shell(tmp_path, lane="A"), board(tmp_path / "root", XAVIER)
    assert run(bundle, root, shell=found).returncode == 0
    bare = msgspec.convert(receipt_of(bundle), TrtexecReceipt)
    assert (bare.board.power_mode, bare.after) == ("mode 0", conditions(tmp_path)), "absent and not zero"
    for name, text in SENSORS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    done = run(bundle, root, shell=found)
    assert (done.returncode, done.stderr) == (0, "")
    receipt = msgspec.convert(receipt_of(bundle), TrtexecReceipt)
    assert receipt.before == receipt.after == conditions(root)
    assert receipt.after.temperatures_c == {"CPU-therm": 41.5}
    assert receipt.after.clocks_mhz == {"cpu0": 2265.6, "gpu": 1377.0}
    assert receipt.after.throttled == ("thermal-cpufreq-0",)
    same = board_from_files(root)
    assert receipt.board.power_mode == same.power_mode == "MODE_15W"
    assert receipt.board.memory_bytes == same.memory_bytes == 9_000_000 * 1024
    assert receipt.board.memory_available_bytes == same.memory_available_bytes == 8_000_000 * 1024


def test_two_at_once_are_refused_whatever_the_first_has_written_so_far(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    folder = bundle.with_name("demo.finalized")
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:  # the instant between taking the lock and writing into it
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run(bundle, root)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert "another finalize is at work; wait until it has ended" in refused.stderr
    with alone(folder):
        assert f"at work (process {os.getpid()}); wait" in run(bundle, root).stderr, (
            "edgeglm's own keeps it away"
        )
    assert run(bundle, root).returncode == 0
    assert json.loads((folder / ".lock").read_text())["pid"] != os.getpid()
    assert not list(folder.glob(".work.*"))


def test_of_many_that_begin_at_once_one_goes_on(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    (root / "usr/src/tensorrt/bin/trtexec").write_text(TRTEXEC.replace("echo timed", "sleep 0.3; echo timed"))
    environment = {
        "PATH": os.environ["PATH"],
        "EDGEGLM_ROOT": str(root),
        "STUB_CALLS": str(root / "calls"),
        "STUB_BUNDLE": str(bundle),
        "STUB_FAILS": "",
        "STUB_WRONG": "",
    }
    command = ["sh", str(bundle / "finalize.sh")]
    many = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(6)
    ]
    assert sorted(one.wait(120) for one in many) == [0, 2, 2, 2, 2, 2]
    assert (root / "calls").read_text().count("--saveEngine") == 4


def test_edgeglms_own_finalize_waits_for_the_script_and_a_killed_one_locks_nobody_out(tmp_path: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    folder = bundle.with_name("demo.finalized")
    trtexec = root / "usr/src/tensorrt/bin/trtexec"
    trtexec.write_text("#!/bin/sh\nexec sleep 60\n")
    environment = {"PATH": os.environ["PATH"], "EDGEGLM_ROOT": str(root)}
    first = subprocess.Popen(
        ["sh", str(bundle / "finalize.sh")],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not list(folder.glob(".work.*/new")) and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(UserError, match=f"at work .process {first.pid}, since"), alone(folder):
            pass
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    trtexec.write_text(TRTEXEC)
    done = run(bundle, root)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob(".work.*")), "what the killed one left is gone"


def test_a_disk_that_is_too_small_is_said_before_an_engine_is_built(tmp_path: Path, small_disk: Path):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    done = run(bundle, root)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"0 MB are free for {small_disk}; free some space and begin again" in done.stderr
    assert not (root / "calls").exists()


@pytest.mark.parametrize("left", [0, 4096, 8192, 16384])
def test_a_disk_that_fills_up_is_said_in_one_line_and_nothing_is_finalized(
    left: int, tmp_path: Path, small_disk: Path
):
    bundle, root = with_shell(tmp_path), board(tmp_path / "root", ORIN)
    df = tmp_path / "bin/df"  # a disk that others fill while the engine is built
    df.parent.mkdir()
    df.write_text("#!/bin/sh\necho head; echo none 9 9 9000000\n")
    df.chmod(0o755)
    with (small_disk / "fill").open("wb") as file:
        file.write(bytes(96 * 1024 - left))
    done = run(bundle, root, path=f"{df.parent}:{os.environ['PATH']}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "no space is left" in done.stderr.splitlines()[-1]
    assert "free some" in done.stderr.splitlines()[-1]
    assert not (small_disk / "receipt-trtexec.json").exists()
    (small_disk / "fill").unlink()
