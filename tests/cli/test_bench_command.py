"""`edgeglm bench` on a real bundle of two tiny towers."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgeglm.cli import main as cli
from scripts.fixtures.colours import colour_bundle, colour_tower
from tests.bench.test_measurement import measurement

SERVER = ("--scenario", "server", "--rate", "5")
QUICK = ("--seconds", "0.2", "--threads", "1")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("edgeglm.bench.bundle_bench._PROBE_SECONDS", 0.02)
    parts: dict[str, bytes] = {
        f"models/{variant}/{kind}.onnx": colour_tower(kind)
        for variant in ("fp32", "int8")
        for kind in ("image", "text")
    }
    return colour_bundle(tmp_path / "colours", **parts)


def ran(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli.exit_code([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


@pytest.mark.parametrize(
    ("scenario", "tower", "more"),
    [
        ("single-stream", "text", ()),
        ("multi-stream", "image", ()),
        ("server", "text", ("--rate", "200")),
        ("offline", "image", ()),
    ],
)
def test_each_scenario_answers_every_sample(scenario, tower, more, bundle, capsys):
    pytest.importorskip("mlperf_loadgen")
    arguments = ("bench", bundle, "--scenario", scenario, "--tower", tower, *QUICK, *more, "--json")
    found = json.loads(ran(capsys, *arguments))["measurement"]
    assert found["scenario"] == scenario
    assert found["samples"] >= found["queries"] >= 1
    assert sum(int(size) * calls for size, calls in found["batches"].items()) == found["samples"]
    assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p99.9"]
    assert found["throughput"] == pytest.approx(found["samples"] / found["seconds"], rel=0.01)
    if scenario == "multi-stream":
        assert found["samples"] == 8 * found["queries"]


def test_a_run_is_written_drawn_and_compared_with_an_earlier_one(bundle, capsys, tmp_path):
    pytest.importorskip("mlperf_loadgen")
    first, plot = tmp_path / "first.json", tmp_path / "first.svg"
    ran(capsys, "bench", bundle, *QUICK, "--output", first, "--plot", plot)
    assert plot.read_text().startswith("<svg")
    text = ran(capsys, "bench", bundle, *QUICK, "--compare", first)
    assert "samples/s" in text
    assert "ratio" in text
    assert "p99.9" in text
    assert "LoadGen's call of Python" in text


def test_long_latencies_and_high_rates_are_told_without_an_exponent(capsys, tmp_path):
    slow, plot = tmp_path / "slow.json", tmp_path / "slow.svg"
    slow.write_bytes(msgspec.json.encode(measurement([1647.2, 2510.0], throughput=17212.8)))
    text = ran(capsys, "bench", "--compare", slow, "--with", slow, "--plot", plot)
    assert "max 2,510 ms" in text
    assert text.count("17,213") == 2  # before and after
    assert "e+0" not in text + plot.read_text()


def test_two_written_runs_are_compared_without_another(capsys, tmp_path):
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    short = measurement(
        [1.0, 2.0], machine="1 CPU core", settings={"rate": 6.0}, valid=False, verdict="short run: 2 asked"
    )
    one.write_bytes(msgspec.json.encode(measurement([2.0, 4.0])))
    other.write_bytes(msgspec.json.encode(short))
    text = ran(capsys, "bench", "--compare", one, "--with", other)
    assert "differs" in text
    assert "1 CPU core" in text
    assert "short run: 2 asked" in text
    assert "not valid" not in text
    found = json.loads(ran(capsys, "bench", "--compare", one, "--with", other, "--json"))
    assert {"name": "p50", "before": 3.0, "after": 1.5, "ratio": 0.5} in found["changes"]
    assert [one["name"] for one in found["differences"]] == ["machine", "valid", "rate"]


def test_a_run_that_cannot_be_compared_is_not_begun(bundle, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeglm.bench.bundle_bench.bundle_measurement", None)
    earlier = tmp_path / "earlier.json"
    earlier.write_bytes(msgspec.json.encode(measurement([2.0, 4.0])))
    again = ("bench", bundle, "--compare", earlier, "--scenario", "offline", "--output", tmp_path / "o.json")
    assert cli.exit_code([str(argument) for argument in again]) == 2
    assert "and is offline; compare runs of the same" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("option", [("--threads", "4"), ("--seconds", "5")])
def test_what_a_comparison_of_two_files_would_not_heed_is_refused(option, capsys):
    assert cli.exit_code(["bench", "--compare", "a.json", "--with", "b.json", *option]) == 2
    assert f"{option[0]} would be ignored" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full stands in for a full disk here")
def test_a_disk_that_is_full_does_not_swallow_what_was_measured(bundle, capsys):
    pytest.importorskip("mlperf_loadgen")
    assert cli.exit_code(["bench", str(bundle), *QUICK, "--output", "/dev/full"]) == 2
    said = capsys.readouterr()
    assert "samples/s" in said.out
    assert "cannot write /dev/full: No space left on device" in said.err


def test_an_earlier_measurement_outlives_a_disk_that_is_full(capsys, tmp_path):
    """It was cut to nothing before the new one was written, and the error said that nothing was changed."""
    one, kept = tmp_path / "one.json", tmp_path / "kept.json"
    for path in (one, kept):
        path.write_bytes(msgspec.json.encode(measurement([1.0, 2.0])))
    before = kept.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        code = cli.exit_code(["bench", "--compare", str(one), "--with", str(one), "--output", str(kept)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "nothing was changed there" in capsys.readouterr().err
    assert kept.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [kept, one]


def test_what_was_measured_is_written_though_the_reader_of_the_words_has_gone(tmp_path, monkeypatch):
    """As with ``| head -1``, a pager that was left or a connection that broke after an hour's run."""
    one, written = tmp_path / "one.json", tmp_path / "written.json"
    one.write_bytes(msgspec.json.encode(measurement([1.0, 2.0])))

    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("edgeglm.cli.bench._print", gone)
    assert cli.exit_code(["bench", "--compare", str(one), "--with", str(one), "--output", str(written)]) == 1
    assert msgspec.json.decode(written.read_bytes()) == msgspec.json.decode(one.read_bytes())


def test_a_plot_does_not_replace_the_measurement_that_it_is_compared_with(capsys, tmp_path):
    one = tmp_path / "one.json"
    one.write_bytes(msgspec.json.encode(measurement([1.0, 2.0])))
    before = one.read_bytes()
    assert cli.exit_code(["bench", "--compare", str(one), "--with", str(one), "--plot", str(one)]) == 2
    assert "--plot would overwrite" in capsys.readouterr().err
    assert one.read_bytes() == before


def test_an_unsigned_bundle_is_measured_on_a_device_with_trusted_keys_if_asked(
    bundle, capsys, tmp_path, monkeypatch
):
    pytest.importorskip("mlperf_loadgen")
    ran(capsys, "keygen", "owner", "--folder", tmp_path)
    monkeypatch.setenv("EDGEGLM_TRUST", str(tmp_path))
    assert cli.exit_code(["bench", str(bundle), *QUICK]) == 2
    assert "--allow-unsigned" in capsys.readouterr().err
    assert "samples/s" in ran(capsys, "bench", bundle, *QUICK, "--allow-unsigned")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a bundle, or --compare and --with"),
        (["--with", "b.json"], "give --compare too, and no bundle"),
        (["some.bundle", "--compare", "a.json", "--with", "b.json"], "give --compare too, and no bundle"),
    ],
)
def test_a_comparison_without_two_files_says_what_to_give(arguments, words, capsys):
    assert cli.exit_code(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scenario", "server"], "needs a rate; give --rate"),
        (["--rate", "5"], "needs a rate"),
        (["--scenario", "server", "--rate", "0"], "give queries a second, finite and above 0"),
        (["--scenario", "server", "--rate", "inf"], "give queries a second, finite and above 0"),
        (["--seconds", "0"], "seconds is 0.0; give a finite number above 0"),
        (["--seconds", "inf"], "seconds is inf; give a finite number above 0"),
        ([*SERVER, "--bound-ms", "nan"], "bound_ms is nan; give a finite number above 0"),
        ([*SERVER, "--bound-ms", "-1"], "bound_ms is -1.0; give a finite number above 0"),
        (["--scenario", "server", "--rate", "1e9"], "1e+09 queries a second for 10 s are more than"),
        (["--seconds", "604800"], "samples a second for 604800 s are more than the 10,000,000 that LoadGen"),
        (["--seconds", "1e300"], "seconds is 1e+300, longer than a week; give at most 604800"),
        ([*SERVER, "--bound-ms", "1e300"], "longer than a week; give at most 604800000"),
        (["--output", "r.json", "--plot", "./r.json"], "--plot would overwrite r.json, the measurement"),
        (["--bound-ms", "5"], "--bound-ms would be ignored: it is of the server scenario"),
        (["--output", "/"], "/ is a folder; give the name of a file in it"),
        (["--compare", "nowhere.json"], "there is no measurement at nowhere.json"),
        (["--plot", "no/such/folder/p.svg"], "choose a folder that is there"),
        (["--variant", "fp61"], "unknown variant 'fp61'"),
    ],
)
def test_a_benchmark_that_makes_no_sense_is_bad_input(arguments, words, bundle, capsys):
    assert cli.exit_code(["bench", str(bundle), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_a_result_is_not_written_over_a_file_of_the_bundle(option, bundle, capsys, tmp_path):
    manifest, link = bundle / "manifest.json", tmp_path / "link"
    link.symlink_to(bundle)
    before = manifest.read_bytes()
    for path in (manifest, link / "manifest.json"):
        assert cli.exit_code(["bench", str(bundle), *QUICK, option, str(path)]) == 2
        assert (
            "lies in the bundle, which would be damaged; choose a place outside it" in capsys.readouterr().err
        )
    assert manifest.read_bytes() == before


def test_without_loadgen_the_user_is_told_what_to_install(bundle, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    assert cli.exit_code(["bench", str(bundle), *QUICK]) == 2
    assert "pip install mlcommons-loadgen" in capsys.readouterr().err


_INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from edgeglm.bench import bundle_bench
from edgeglm.cli import main as cli

drive, told = bundle_bench.drive, []

def driven(ask, load):
    async def first(index):
        if not told:
            told.append(print("asked", flush=True))
        return await ask(index)
    return drive(first, load)

bundle_bench.drive = driven
cli.main(["bench", sys.argv[1], "--scenario", sys.argv[2], "--seconds", "60", "--threads", "1"])
"""


@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream"])
def test_ctrl_c_in_a_run_exits_with_130_though_loadgen_goes_on(scenario, bundle):
    pytest.importorskip("mlperf_loadgen")
    command = [sys.executable, "-c", _INTERRUPTED, str(bundle), scenario]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert text == "\ninterrupted; run the same command again to resume\n"


def test_engines_without_number_are_refused_before_any_is_loaded(bundle, capsys):
    assert cli.exit_code(["bench", str(bundle), "--instances", "5000"]) == 2
    assert "5000 is not in the range 1<=x<=64" in capsys.readouterr().err
