"""What the server costs and how it stands beside its peers: ratios, interleaved in one run.

    .venv/bin/python scripts/bench/serve.py --bundle BUNDLE --peers PEER/bin --output docs/bench/serve

Writes serve.json and serve.md. ``--peers`` is the folder of programs of an environment of its own:

    python3.11 -m venv PEER && PEER/bin/pip install -r scripts/bench/serve-peers.txt
    apt-get install nghttp2-client    # h2load, which asks all servers

Every server runs the bundle's text tower, with one thread and batches of up to 32, and logs no requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from measured_row import Row, measured_row  # noqa: E402
from serve_loads import cpu_seconds, h2load_rate, http_circle, tree_cpu_seconds  # noqa: E402
from serve_overload import overload  # noqa: E402
from serve_requests import BODIES, TOGETHER, http_request, id_lists, v2_binary, v2_grpc, v2_json  # noqa: E402
from serve_started import free_port, ours, started  # noqa: E402


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
        asyncio.run(http_circle(address, [request], 8, 0.5))
        for _ in range(rounds):
            found = {}
            for callers in (1, 64):
                used = cpu_seconds(process.pid)
                load = asyncio.run(http_circle(address, [request], callers, seconds))
                cpu = (cpu_seconds(process.pid) - used) / len(load.latencies) * 1e6
                command = [*noop, "runner", str(callers), str(seconds)]
                runner = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                found[callers] = (load.percentile(0.5) * 1e6 - runner["p50_us"], cpu - runner["cpu_us"])
            alone.append(found[1][0] / 1e3)
            loaded.append(found[64][1])
    note = "binary tensors over HTTP, an engine that does nothing; minus the runner called in process"
    cores = "; the server's process alone, of user and kernel"
    return [
        measured_row("p50 added by HTTP, one caller", "ms", alone, 0.5, 0.25, note),
        measured_row(
            "processor time added by HTTP a request, 64 callers", "us", loaded, 60, 30, note + cores
        ),
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
        lists = id_lists()
        infer = f"http://{address}/v2/models/text/infer"
        lengths = {v2_binary(ids)[1] for ids in lists}
        assert len(lengths) == 1, "the head names one length of the JSON"
        is_json = ("Content-Type: application/json",)
        is_grpc = ("Content-Type: application/grpc", "TE: trailers")
        ways = {
            "json": (infer, [v2_json(ids) for ids in lists], is_json),
            "binary": (
                infer,
                [v2_binary(ids)[0] for ids in lists],
                (f"Inference-Header-Content-Length: {lengths.pop()}",),
            ),
            "grpc": (
                f"http://{grpc_address}/inference.GRPCInferenceService/ModelInfer",
                [v2_grpc(ids) for ids in lists],
                is_grpc,
            ),
            "LitServe": (
                f"http://{lit}/predict",
                [json.dumps({"input_ids": ids}).encode() for ids in lists],
                is_json,
            ),
            "BentoML": (
                f"http://{bento}/embed",
                [json.dumps({"input_ids": [ids]}).encode() for ids in lists],
                is_json,
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(-1, rounds):
            first = (turn + 1) * TOGETHER % BODIES
            for name, (url, bodies, headers) in ways.items():
                used = tree_cpu_seconds(pids[name])
                rate, done = h2load_rate(
                    url,
                    bodies[first : first + TOGETHER],
                    headers,
                    seconds=seconds,
                    callers=64,
                    grpc=name == "grpc",
                )
                if turn >= 0:
                    rates[name].append(rate)
                    costs[name].append((tree_cpu_seconds(pids[name]) - used) / done * 1e6)
    rows = []
    for peer in ("LitServe", "BentoML"):
        for name, words in (("json", "HTTP, JSON"), ("binary", "HTTP, binary"), ("grpc", "gRPC")):
            ratios = [mine / theirs for mine, theirs in zip(rates[name], rates[peer], strict=True)]
            mine, theirs = (statistics.median(rates[who]) for who in (name, peer))
            note = f"{mine:,.0f} against {theirs:,.0f} a second; 64 callers, the text tower, one thread, "
            note += f"batches up to 32; the peer speaks JSON; {TOGETHER} h2loads ask all, "
            note += f"{min(TOGETHER * (rounds + 1), BODIES)} bodies over the rounds; no access logs"
            rows.append(measured_row(f"requests a second, {words} / {peer}", "ratio", ratios, 1.5, 3.0, note))
            ratios = [theirs / mine for mine, theirs in zip(costs[name], costs[peer], strict=True)]
            mine, theirs = (statistics.median(costs[who]) for who in (name, peer))
            note = f"{mine:,.0f} against {theirs:,.0f} us of the servers' processes, in the same rounds"
            rows.append(
                measured_row(f"processor time a request, {peer} / {words}", "ratio", ratios, 1.5, 3.0, note)
            )
    return rows


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
        f"Machine: {found['machine']}. It is shared: ratios and processor times say more than times by the "
        "clock.",
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
        kept = [one for one in page["rows"] if one.get("group") != given.only]
        former = [{"commit": page["commit"], **row} for row in kept]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = [
        {**row, "commit": commit, "group": name}
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
