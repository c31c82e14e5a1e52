from __future__ import annotations

import asyncio
import time
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.bench.loadgen import Load, _answer, _short, _Tally, drive, verdict_from_summary
from edgeglm.bench.measurement import (
    Measurement,
    Scenario,
    changes,
    differences,
    latency_summary,
    measurement_from_file,
)
from edgeglm.bench.plot import svg_from_measurement
from edgeglm.core.errors import UserError
from edgeglm.runtime.config import RunnerConfig

times = st.lists(st.floats(1e-4, 1e5), min_size=1, max_size=50)


def measurement(latencies: list[float], **changed: object) -> Measurement:
    latency, curve = latency_summary(latencies)
    found = Measurement(
        bundle="fruit <&>",
        content_digest="a" * 64,
        variant="fp32",
        tower="text",
        scenario="server",
        engine="ONNX Runtime",
        machine="2 shared x86-64 CPU cores",
        settings={"rate": 5.0},
        queries=len(latencies),
        samples=len(latencies),
        seconds=1.0,
        throughput=float(len(latencies)),
        latency_ms=latency,
        curve_ms=curve,
        batches={1: 3, 32: 1},
        valid=True,
    )
    return msgspec.structs.replace(found, **changed)


@given(times)
def test_percentiles_rise_and_end_at_the_slowest_query(latencies: list[float]):
    summary, curve = latency_summary(latencies)
    assert summary["p50"] <= summary["p90"] <= summary["p99"] <= summary["p99.9"] <= summary["max"]
    assert summary["max"] == pytest.approx(max(latencies), abs=1e-4)
    assert list(curve) == sorted(curve)


@given(times, st.dictionaries(st.integers(1, 64), st.integers(1, 10**6), max_size=40))
def test_every_measurement_can_be_drawn(latencies: list[float], batches: dict[int, int]):
    drawn = ET.fromstring(svg_from_measurement(measurement(latencies, batches=batches)))
    numbers = [float(n) for line in drawn.iter() for n in line.get("points", "").replace(",", " ").split()]
    assert numbers
    assert np.isfinite(numbers).all()


def test_a_written_measurement_is_read_back_and_compared(tmp_path):
    before, after = measurement([2.0, 4.0]), measurement([1.0, 2.0], throughput=5.0)
    (tmp_path / "before.json").write_bytes(msgspec.json.encode(before))
    assert measurement_from_file(tmp_path / "before.json") == before
    by_name = {change.name: change.ratio for change in changes(before, after)}
    assert by_name["throughput"] == 2.5
    assert by_name["p50"] == 0.5


def test_what_differed_beside_the_figures_is_listed():
    before = measurement([1.0], settings={"rate": 5.0, "threads": 1})
    after = measurement([2.0], settings={"threads": 2}, content_digest="b" * 64, machine="1 CPU core")
    found = {one.name: (one.before, one.after) for one in differences(before, after)}
    assert found == {
        "content_digest": ("a" * 64, "b" * 64),
        "machine": ("2 shared x86-64 CPU cores", "1 CPU core"),
        "rate": (5.0, None),
        "threads": (1, 2),
    }
    assert differences(before, before) == []


def test_runs_of_two_scenarios_are_not_compared():
    with pytest.raises(UserError, match="the scenario was server and is offline; compare runs of the same"):
        changes(measurement([1.0]), measurement([1.0], scenario="offline"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b"\xff", None])
def test_a_file_that_is_no_measurement_is_refused(content, tmp_path):
    path = tmp_path / "m.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="write one with edgeglm bench --output"):
        measurement_from_file(path)


def test_a_measurement_without_its_figures_is_refused_before_it_is_compared_or_drawn(tmp_path):
    path = tmp_path / "m.json"
    for changed, words in (
        ({"latency_ms": {"p50": 1.0}}, "no p90, p99, p99.9, mean, max"),
        ({"curve_ms": ()}, "no curve"),
    ):
        path.write_bytes(msgspec.json.encode(measurement([1.0], **changed)))
        with pytest.raises(UserError, match=f"has {words}.*; write one with edgeglm bench --output"):
            measurement_from_file(path)


@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream", "offline"])
def test_what_loadgen_does_with_the_last_answer_is_no_part_of_a_querys_latency(scenario: Scenario):
    told = []

    def complete(responses: list[object]) -> None:
        told.append(responses)
        time.sleep(0.02 if len(told) % samples == 0 else 0)  # as where it sends the next query

    async def ask(_: int) -> None:
        """Answer at once."""

    samples = 1 if scenario == "single-stream" else 8
    lib = SimpleNamespace(QuerySamplesComplete=complete, QuerySampleResponse=lambda *parts: parts)
    tally = _Tally(scenario)
    query = [(number, number) for number in range(samples)]
    asyncio.run(_answer(lib, ask, tally, query, time.perf_counter()))
    assert len(told) == samples == tally.samples
    assert len(tally.latencies_ms) == (samples if scenario == "offline" else 1)
    assert max(tally.latencies_ms) < 15


def test_the_samples_of_an_offline_run_are_not_all_begun_at_once():
    """Each that waits for its place keeps kilobytes: a run of ten minutes, MLPerf's own, filled memory."""
    asked = most = 0

    async def ask(_: int) -> None:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await asyncio.sleep(0)
        asked -= 1

    lib = SimpleNamespace(QuerySamplesComplete=len, QuerySampleResponse=lambda *parts: parts)
    tally, samples = _Tally("offline"), [(number, number) for number in range(10_000)]
    asyncio.run(_answer(lib, ask, tally, samples, time.perf_counter()))
    assert tally.samples == len(tally.latencies_ms) == len(samples)
    assert RunnerConfig().capacity < most < 5000


def test_the_verdict_of_loadgen_is_passed_on_with_its_reasons():
    text = "Result is : INVALID\n  Min duration satisfied : NO\nRecommendations:\n * Increase the count.\n"
    assert verdict_from_summary(text) == (False, "Increase the count.; Min duration satisfied : NO")
    assert verdict_from_summary("Result is             : VALID\n") == (True, "")


@pytest.mark.parametrize(
    ("scenario", "queries", "samples", "seconds", "words"),
    [
        (
            "single-stream",
            99,
            99,
            10.0,
            "short run: 99 asked in 10 s, where LoadGen's own minimum is 100 in 10 s",
        ),
        ("single-stream", 5000, 5000, 0.5, "short run: 5000 asked in 0.5 s"),
        ("server", 100, 100, 10.0, ""),
        ("offline", 1, 5000, 10.0, ""),
        ("offline", 1, 50, 10.0, "short run: 50 asked"),
    ],
)
def test_a_run_under_the_minimum_of_loadgen_is_called_short(scenario, queries, samples, seconds, words):
    lib = SimpleNamespace(TestSettings=lambda: SimpleNamespace(min_query_count=100, min_duration_ms=10_000))
    load = Load(scenario=scenario, seconds=seconds, inputs=1)
    found = _short(lib, load, _Tally(scenario, queries=queries, samples=samples))
    assert found.startswith(words) if words else found == ""


@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream"])
def test_a_stream_of_quick_answers_lasts_as_long_as_was_asked(scenario: Scenario):
    pytest.importorskip("mlperf_loadgen")

    async def ask(_: int) -> None:
        """Answer at once."""

    report = asyncio.run(drive(ask, Load(scenario=scenario, seconds=0.5, inputs=4, rate=200_000.0)))
    assert report.seconds > 0.4
    assert "Min duration" not in report.verdict
