"""The server, or its runner alone, around an engine that does nothing, for the server's benchmark.

    python scripts/bench/serve_noop.py server
    python scripts/bench/serve_noop.py runner CALLERS SECONDS

Both write one JSON document: where the server listens, or what the runner cost.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from edgeglm.runtime.config import RunnerConfig  # noqa: E402
from edgeglm.runtime.runner import Runner  # noqa: E402
from edgeglm.serve.config import ServeConfig  # noqa: E402
from edgeglm.serve.server import serve  # noqa: E402
from scripts.fixtures.colours import colour_bundle, colour_engine  # noqa: E402


def runner_config() -> RunnerConfig:
    """Both run with this."""
    return RunnerConfig(engine=colour_engine, when_full="shed")


async def runner_alone(bundle: Path, callers: int, seconds: float) -> dict[str, float]:
    """Ask in circles; return the median latency and the processor time of a request, in us."""
    latencies: list[float] = []
    ids = np.array([1, 1], np.int64)
    async with Runner(bundle, runner_config()) as runner:
        until = time.perf_counter() + seconds

        async def ask() -> None:
            while (began := time.perf_counter()) < until:
                await runner.infer("text", {"input_ids": ids, "attention_mask": ids})
                latencies.append(time.perf_counter() - began)

        used = time.process_time()
        await asyncio.gather(*(ask() for _ in range(callers)))
        used = time.process_time() - used
    return {"p50_us": statistics.median(latencies) * 1e6, "cpu_us": used / len(latencies) * 1e6}


def main() -> None:
    """Run what the command line says."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = colour_bundle(Path(folder) / "noop")
        if sys.argv[1] == "runner":
            import uvloop

            uvloop.install()
            found = asyncio.run(runner_alone(bundle, int(sys.argv[2]), float(sys.argv[3])))
            sys.stdout.write(json.dumps(found) + "\n")
            return
        config = ServeConfig(port=0, grpc_port=0, access_log=False, runner=runner_config())

        def said(where: object) -> None:
            sys.stdout.write(json.dumps({"http": where.http, "grpc": where.grpc}) + "\n")  # type: ignore[attr-defined]
            sys.stdout.flush()

        serve(bundle, config, serving=said)


if __name__ == "__main__":
    main()
