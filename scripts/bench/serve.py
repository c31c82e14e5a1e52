"""What the server costs and how it stands beside its peers: ratios, interleaved in one run.

    .venv/bin/python scripts/bench/serve.py --bundle BUNDLE --peers PEER/bin --output docs/bench/serve

Writes serve.json and serve.md. ``--peers`` is the folder of programs of an environment of its own:

    python3.11 -m venv PEER && PEER/bin/pip install -r scripts/bench/serve-peers.txt
    apt-get install nghttp2-client    # h2load, which asks all servers

Every server runs the bundle's text tower, with one thread and batches of up to 32.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from serve_loads import (  # noqa: E402
    Load,
    cpu_seconds,
    h2load_rate,
    http_circle,
    http_timetable,
    idle,
    memory_bytes,
    tree_cpu_seconds,
)
from serve_requests import http_request, v2_binary, v2_grpc, v2_json  # noqa: E402

IDS = [5, 17, 42, 7, 9, 11, 3, 2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
Row = dict[str, Any]


@contextlib.contextmanager
def started(command: list[str], address: str | None = None, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Run a server till the end of the block; gives what it says on stdout, or waits for ``address``."""
    stdout = subprocess.PIPE if address is None else subprocess.DEVNULL
    environment = {**ENVIRONMENT, **options.pop("env", {})}
    process = subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.DEVNULL, env=environment, start_new_session=True, **options
    )
    try:
        if address is None:
            assert process.stdout is not None
            text = b""
            while text.count(b"{") == 0 or text.count(b"{") != text.count(b"}"):
                text += process.stdout.readline()
            yield process, json.loads(text)
        else:
            host, _, port = address.rpartition(":")
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                    break
                time.sleep(0.1)
            time.sleep(3)  # workers may still load
            yield process, None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """Find a port."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def row(name: str, unit: str, values: list[float], reach: float, beyond: float, note: str) -> Row:
    """One line: ``ratio`` is the more the better, all else the less."""
    value = statistics.median(values)
    more = unit == "ratio"
    good, better = (value >= reach, value >= beyond) if more else (value <= reach, value <= beyond)
    return {
        "name": name,
        "unit": unit,
        "value": round(value, 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
        "rounds": len(values),
        "reach": reach,
        "beyond": beyond,
        "result": "beyond" if better else "reached" if good else "falls short",
        "note": note,
    }


def overhead(rounds: int, seconds: float) -> list[Row]:
    """What the HTTP face adds to the runner, with an engine that does nothing."""
    noop = [sys.executable, str(ROOT / "scripts/bench/serve_noop.py")]
    alone: list[float] = []
    loaded: list[float] = []
    with started([*noop, "server"]) as (process, where):
        address = where["http"].partition("//")[2]
        body, length = v2_binary([1, 1])
        header = f"Inference-Header-Content-Length: {length}\r\n"
        request = http_request(address, "/v2/models/text/infer", body, header)
        asyncio.run(http_circle(address, request, 8, 0.5))
        for _ in range(rounds):
            found = {}
            for callers in (1, 64):
                used = cpu_seconds(process.pid)
                load = asyncio.run(http_circle(address, request, callers, seconds))
                cpu = (cpu_seconds(process.pid) - used) / len(load.latencies) * 1e6
                command = [*noop, "runner", str(callers), str(seconds)]
                runner = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                found[callers] = (load.percentile(0.5) * 1e6 - runner["p50_us"], cpu - runner["cpu_us"])
            alone.append(found[1][0] / 1e3)
            loaded.append(found[64][1])
    note = "binary tensors over HTTP, an engine that does nothing; minus the runner called in process"
    cores = "; the server's process alone, of user and kernel"
    return [
        row("p50 added by HTTP, one caller", "ms", alone, 0.5, 0.25, note),
        row("processor time added by HTTP a request, 64 callers", "us", loaded, 60, 30, note + cores),
    ]


def beside_peers(bundle: Path, peers: Path, rounds: int, seconds: float) -> list[Row]:
    """Requests a second of 64 callers, beside LitServe and BentoML."""
    tower = str(bundle / "models/fp32/text.onnx")
    lit, bento = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with contextlib.ExitStack() as stack:
        process, where = stack.enter_context(started(ours(bundle)))
        pids = dict.fromkeys(("json", "binary", "grpc"), process.pid)
        address, grpc_address = where["http"].partition("//")[2], where["grpc"]
        script = str(ROOT / "scripts/bench/serve_litserve.py")
        port = lit.rpartition(":")[2]
        process, _ = stack.enter_context(started([str(peers / "python"), script, port, tower], lit))
        pids["LitServe"] = process.pid
        port = bento.rpartition(":")[2]
        command = [str(peers / "bentoml"), "serve", "serve_bentoml:TextTower", "--port", port]
        process, _ = stack.enter_context(
            started(command, bento, env={"TEXT_TOWER": tower}, cwd=ROOT / "scripts/bench")
        )
        pids["BentoML"] = process.pid
        one = json.dumps({"input_ids": IDS}).encode()
        many = json.dumps({"input_ids": [IDS]}).encode()
        infer = f"http://{address}/v2/models/text/infer"
        binary, length = v2_binary(IDS)
        is_json = ("Content-Type: application/json",)
        is_grpc = ("Content-Type: application/grpc", "TE: trailers")
        ways = {
            "json": (infer, v2_json(IDS), is_json),
            "binary": (infer, binary, (f"Inference-Header-Content-Length: {length}",)),
            "grpc": (
                f"http://{grpc_address}/inference.GRPCInferenceService/ModelInfer",
                v2_grpc(IDS),
                is_grpc,
            ),
            "LitServe": (f"http://{lit}/predict", one, is_json),
            "BentoML": (f"http://{bento}/embed", many, is_json),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(-1, rounds):
            for name, (url, body, headers) in ways.items():
                used = tree_cpu_seconds(pids[name])
                rate, done = h2load_rate(url, body, headers, seconds=seconds, callers=64, grpc=name == "grpc")
                if turn >= 0:
                    rates[name].append(rate)
                    costs[name].append((tree_cpu_seconds(pids[name]) - used) / done * 1e6)
    rows = []
    for peer in ("LitServe", "BentoML"):
        for name, words in (("json", "HTTP, JSON"), ("binary", "HTTP, binary"), ("grpc", "gRPC")):
            ratios = [mine / theirs for mine, theirs in zip(rates[name], rates[peer], strict=True)]
            mine, theirs = (statistics.median(rates[who]) for who in (name, peer))
            note = f"{mine:,.0f} against {theirs:,.0f} a second; 64 callers, the text tower, one thread, "
            note += "batches up to 32; the peer speaks JSON; h2load asks all"
            rows.append(row(f"requests a second, {words} / {peer}", "ratio", ratios, 1.5, 3.0, note))
            ratios = [theirs / mine for mine, theirs in zip(costs[name], costs[peer], strict=True)]
            mine, theirs = (statistics.median(costs[who]) for who in (name, peer))
            note = f"{mine:,.0f} against {theirs:,.0f} us of the servers' processes, in the same rounds"
            rows.append(row(f"processor time a request, {peer} / {words}", "ratio", ratios, 1.5, 3.0, note))
    return rows


def ours(bundle: Path, *options: str) -> list[str]:
    """The server as people start it, with one thread an operator and no log of each request."""
    command = [sys.executable, "-m", "edgeglm.cli.main", "serve", str(bundle), "--json", "--threads", "1"]
    return [*command, "--port", "0", "--grpc-port", "0", "--no-access-log", *options]


def overload(bundle: Path, seconds: float) -> list[Row]:
    """Twice what it can do, from 64 connections, beside 1,000 that say nothing; in ten parts."""

    async def measured(pid: int, address: str) -> list[Row]:
        request = http_request(address, "/v2/models/text/infer", v2_json(IDS))
        async with idle(address, 1000) as quiet:
            usual = await http_circle(address, request, 64, 10)
            await http_timetable(address, request, 64, 2 * usual.rate, 5)
            memory = [memory_bytes(pid)]
            parts = []
            for _ in range(10):
                parts.append(await http_timetable(address, request, 64, 2 * usual.rate, seconds / 10))
                memory.append(memory_bytes(pid))
            again = await http_circle(address, request, 64, 10)
            while quiet.open < 1000:  # some may be on their way back
                await asyncio.sleep(0.1)
        base = min(usual.percentile(0.99), again.percentile(0.99))
        statuses = sum((Counter(part.statuses) for part in parts), Counter())
        all_ = Load([latency for part in parts for latency in part.latencies])
        others = sum(count for status, count in statuses.items() if status not in (200, 429))
        note = f"{seconds:g} s in ten parts, the median part; p99 of all accepted together "
        note += f"{all_.percentile(0.99) / base:.2f} times; the lesser of the p99 before and after; "
        note += f"64 callers ask on a timetable, queue of 32 rows; statuses {dict(statuses)}"
        silent = f"beside {quiet.open:,} connections that say nothing, opened anew "
        silent += f"{quiet.reopened:,} times when the server had closed them for it"
        return [
            row(
                "p99 of accepted, asked twice as often as it can answer / p99 of 64 callers in circles",
                "times", [part.percentile(0.99) / base for part in parts], 2.0, 1.0, note,
            ),
            row("answers other than 200 and 429", "answers", [float(others)], 0, 0, silent),
            row(
                "memory after / before", "times", [held / memory[0] for held in memory[1:]], 1.05, 1.01,
                f"{memory[0] / 1e6:.0f} MB before, {memory[-1] / 1e6:.0f} MB after {seconds:g} s; "
                "looked at after each part",
            ),
        ]  # fmt: skip

    with started(ours(bundle, "--queue", "32")) as (process, where):
        return asyncio.run(measured(process.pid, where["http"].partition("//")[2]))


TRIED = {
    "requests a second, gRPC / LitServe": (
        "Around an engine that does nothing a call takes about five times the processor time of one over "
        "HTTP, half of it in grpc.aio: a bare echo took 360 to 410 us on a busy machine. An echo on "
        "gRPC's synchronous server took 320, and 470 where the event loop answers through its non-blocking "
        "way, so neither was taken. What precedes a message's tensors is now read once, and answers are "
        "written as bytes. Not tried: an HTTP/2 server of our own."
    ),
    "p50 added by HTTP, one caller": (
        "On a machine whose cores others keep busy each of a request's four thread and process switches may "
        "wait for a core; the lowest round tells what the work itself takes."
    ),
    "processor time added by HTTP a request, 64 callers": (
        "About 200 us through ASGI; 120 with whole requests answered at the transport; 80 to 100 with what "
        "was loaded kept out of garbage collection and dtypes named once. Then: the requests of one turn "
        "begin together, none has a task or a timer of its own, and heads and the JSON around binary "
        "tensors are read and written once where a caller repeats them. Last: tensors are views made from "
        "what is known of a head, shapes pass the runner's checks by a look-up, and nothing is made for a "
        "log that nobody keeps; without sockets a request took 37 us then, not 96, of which the runner 11. "
        "The same tree took 75 us (50 to 106) half an hour before the row above: so much do shared cores "
        "differ from themselves."
    ),
}


def markdown(found: dict[str, Any]) -> str:
    """Write the page."""
    lines = [
        "# The server beside its peers",
        "",
        f"Machine: {found['machine']}. Other work was under way, so only ratios and processor times count.",
        "Medians of interleaved rounds, with the lowest and the highest round. Callers share the cores.",
        "",
        "| what | median | rounds: low to high | reach | beyond | result | notes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found["rows"]:
        sign = ">=" if r["unit"] == "ratio" else "<="
        note = r["note"] + ("" if r["commit"] == found["commit"] else f"; commit {r['commit']}")
        unit = "" if r["unit"] in ("ratio", "times", "answers") else f" {r['unit']}"
        lines.append(
            f"| {r['name']} | {r['value']}{unit} | {r['rounds']}: {r['low']} to {r['high']} "
            f"| {sign} {r['reach']} | {sign} {r['beyond']} | {r['result']} | {note} |"
        )
    short = [r["name"] for r in found["rows"] if r["result"] == "falls short"]
    for name in short:
        lines += ["", f"**{name}** falls short. {TRIED.get(name, 'Not looked into yet.')}"]
    lines += [
        "",
        f"Made by `{found['command']}`, at commit {found['commit']} where a row names no other; figures in "
        "`serve.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--only", choices=("peers", "overhead", "overload"), help="Keep the other rows.")
    parser.add_argument("--overload-seconds", type=float, default=600.0)
    given = parser.parse_args()
    groups = {
        "peers": lambda: beside_peers(given.bundle, given.peers, given.rounds, given.seconds),
        "overhead": lambda: overhead(given.rounds, given.seconds),
        "overload": lambda: overload(given.bundle, given.overload_seconds),
    }
    former: list[Row] = []
    if given.only is not None:  # before anything is measured: it may not be there
        page = json.loads(given.output.with_suffix(".json").read_bytes())
        former = [{"commit": page["commit"], **row} for row in page["rows"]]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = [
        {**row, "commit": commit}
        for name in ([given.only] if given.only else groups)
        for row in groups[name]()
    ]
    fresh = {row["name"]: row for row in rows}
    rows = [*[fresh.pop(row["name"], row) for row in former], *fresh.values()]
    versions = subprocess.run(
        [given.peers / "pip", "list", "--format", "json"], capture_output=True, check=True
    ).stdout
    peers = {p["name"]: p["version"] for p in json.loads(versions) if p["name"] in ("litserve", "bentoml")}
    found = {
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores, "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(peers.items())),
        "command": ".venv/bin/python scripts/bench/serve.py --bundle BUNDLE --peers PEER/bin "
        "--output docs/bench/serve",
        "commit": commit,
        "rows": rows,
    }
    given.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    main()
