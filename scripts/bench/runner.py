"""How much of an engine's speed the runner keeps: ratios against peers, interleaved in one run.

    .venv/bin/python scripts/bench/runner.py --output docs/bench/runner --peers PEERS/bin

Writes runner.json and runner.md. Each figure is the median of rounds in which every system is measured
once, in turn; ratios are taken within a round. `--only NAME` runs one group and keeps the other rows.
`--peers` names the `bin` of an environment of its own in which LitServe and BentoML are installed:

    python -m venv PEERS
    PEERS/bin/pip install -r scripts/bench/serve-peers.txt

Figures of a tree with changes are not written below docs, unless `--allow-dirty` says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from measured_row import Row  # noqa: E402
from runner_groups import lengths, throughput  # noqa: E402
from runner_overhead import overhead  # noqa: E402
from runner_peers import peers  # noqa: E402
from runner_poisson import poisson  # noqa: E402
from runner_report import check_publishable, commit_of, markdown  # noqa: E402

# Said below the table of rows that fall short.
TRIED = {
    "highest Poisson rate with p99 <= 5 full-batch calls / saturated raw": (
        "it was 0.7 for both batchers at 6ae13ce. A greedy server without any cost of its own has a p99 "
        "below 2 calls at 0.75 on those arrivals, so it was not a burst: the benchmark kept each task "
        "that had ended, and a pass of the collector over them took 38 ms of CPU, eight calls, once in "
        "three seconds. They are let go now, and there is no such pass; each share has 5 s of arrivals in"
        " place of 1.2."
    ),
    "throughput / raw, calls of 0.2 to 1 ms: the shortest": (
        "0.822 at e692185 on an AMD EPYC, whose raw call took 0.32 ms; 0.60 at b1af5e8, 0.773 at 6ae13ce,"
        " and it fell to 0.703 at 702b957: why was not explained, for what was changed in between was to "
        "raise it. The engine's thread neither checks the feeds that were built for it nor looks for NaN,"
        " takes a whole line of the queue at once, and notes the end of a call with the beginning of the "
        "next. By CPU time, which other work disturbs less, its own share of a batch fell from 134 to 55 "
        "us (387 to 409 us for the raw call), the event loop's from 430 to 276. A switch interval of 0.1 "
        "ms changed nothing. 0.671 at 7efd954, and 0.963 of long calls; with the rows of 28d9871 in, both "
        "were run in turn, three processes each (no script was kept): 976263e gave 0.59, 0.54 and 0.49, "
        "28d9871 0.57, 0.53 and 0.60, of long calls 0.94, 0.90 and 0.98 beside 0.92, 0.92 and 0.97. The "
        "machine was slower that day, then; the code is not."
    ),
    "throughput / raw, calls of 3 ms and more, 49 kB a sample": (
        "joining 32 samples copies 1.5 MB in the engine's thread in each call, 90 us of CPU if it lies in"
        " the cache and 150 if not; the raw loop is fed the same joined batch again and again. A batch "
        "that is kept and written anew saves 5 us. Joining the next full batch in the loop's thread while"
        " the present call runs was built and taken out: 712 to 297 us between two calls, but each call "
        "took as much longer (40 interleaved rounds on a busy machine); probably its input then lies in "
        "the other core's cache. What came later is in the row of short calls."
    ),
    "throughput / raw, calls of 3 ms and more": (
        "0.965 at e692185 on an AMD EPYC, whose raw call took 3.83 ms; 0.945 at 6ae13ce, 0.963 at "
        "7efd954. What came later is in the row of short calls: by CPU time a batch costs the engine's "
        "thread about 60 us beside the call. Three more runs of this group at 9a184af, whose raw loop was "
        "disturbed in the first and the last, gave 1.042, 0.983 and 0.962, with 49 kB a sample 0.919, 0.923 "
        "and 1.028; of short calls 0.629, 0.605 and 0.633 at the shortest. Their rows are not taken in."
    ),
    "added us a request, engine that does nothing, 64 callers": (
        "12 before answers were booked by the batch, 7.8 at 6ae13ce; from the call to the queue a request"
        " takes 3.1 us in place of 4.4 since the running loop and the process are no longer asked for "
        "each time."
    ),
    "p50 us of one caller, engine that does nothing": (
        "98 at e692185 on an AMD EPYC with a floor of 65. On an Intel Xeon the code of e692185 and that of "
        "baf1afd, in three processes each in turn (this group's own loop; no script was kept), gave 131 and "
        "135 us, and both 54 pinned: its Python is slower, its matrix products are faster. "
        "124 at 6ae13ce, 144.6 at 887eba4, which was not "
        "explained. The bell is rung outside the queue's lock and before the worker's own books now, with"
        " the interpreter given up; the engine's thread does 8 us of Python where it did 32. The best "
        "windows of 25 requests on a busy machine fell from 116 to 98 us (tenth percentile 119 to 101). "
        "56 us was reached only with the process pinned to one core: else, probably, each object that "
        "both threads touch travels from one core's cache to the other's: cutting one answer took about "
        "20 us, and 32 of them take 32 if no other thread was at them. Spinning was built and taken out: "
        "the engine's thread, and the event loop too, looked for each other for up to 60 us without the "
        "interpreter lock (the C library's lfind). The best windows were 76 us, still above 60, and where"
        " other work ran each spin held up the thread that it waited for. "
        "Keeping the engine's thread on the loop's core while one caller asks for short calls was "
        "built and taken out too (no script was kept): while the other core sleeps, the scheduler "
        "wakes the loop on that one, so that both are apart again, and 139 to 166 us stood beside 139 "
        "to 172; while other work holds it they stay together by themselves, and a lone caller waits "
        "48 to 60 us."
    ),
}


async def measured(groups: Sequence[str], threads: int, binaries: Path | None) -> list[Row]:
    """Run some groups of measurements."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for group in groups:
            if group == "throughput":
                rows += await throughput(folder, threads)
            elif group == "overhead":
                rows += await overhead()
            elif group == "peers":
                rows += await peers(binaries) if binaries is not None else []
            elif group == "poisson":
                rows += await poisson(folder, threads)
            else:
                rows += await lengths(folder, threads)
    return rows


def main() -> None:
    """Measure, and write both files."""
    groups = ("throughput", "overhead", "peers", "poisson", "lengths")
    parser = argparse.ArgumentParser(description="The runner beside its peers.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "bench" / "runner")
    parser.add_argument("--only", choices=groups, action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--allow-dirty", action="store_true", help="Publish figures of a changed tree.")
    parser.add_argument("--peers", type=Path, help="The bin of an environment with LitServe and BentoML.")
    arguments = parser.parse_args()
    check_publishable(ROOT, arguments.output, allow_dirty=arguments.allow_dirty)
    import onnxruntime

    rows = asyncio.run(measured(arguments.only or groups, arguments.threads, arguments.peers))
    commit = commit_of(ROOT)
    path = arguments.output.with_suffix(".json")
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {found["name"]: {**found, "commit": commit} for found in rows}
    kept = {found["name"]: found for found in before}
    report = {
        "command": ".venv/bin/python scripts/bench/runner.py --output docs/bench/runner --peers PEERS/bin",
        "machine": f"{os.cpu_count()} shared {platform.machine().replace('_', '-')} CPU cores",
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "rows": list({**kept, **fresh}.values()),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(report, TRIED))
    sys.stdout.write(markdown(report, TRIED))


if __name__ == "__main__":
    main()
