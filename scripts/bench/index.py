"""The index beside exact search, its crash test, and the search page.

    .venv/bin/python scripts/bench/index.py BUNDLE INDEX

INDEX is one of 5,000 pictures that BUNDLE embedded (docs/search.md makes it). The vectors that are searched
are made of its embeddings: 200,000 times one of them is drawn and Gaussian noise of NOISE times its length is
added, so that they lie in clusters as pictures of a shop do. Half of the queries are the texts of pictures,
through the text tower, half are pictures with noise. Every system answers the same queries one by one on one
thread, in turn, in each round. Writes docs/bench/index.json and index.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from index_page import page_measured  # noqa: E402

from edgeglm.bundle.verify import open_bundle  # noqa: E402
from edgeglm.index.codes import FloatRows  # noqa: E402
from edgeglm.index.records import IndexHeader  # noqa: E402
from edgeglm.index.vector_index import VectorIndex, create_index  # noqa: E402
from edgeglm.index.writer import IndexWriter, NewRow  # noqa: E402
from edgeglm.runtime.retrieval import Retriever  # noqa: E402

OUT = ROOT / "docs" / "bench"
ROWS, QUERIES, ROUNDS, K, NOISE = 200_000, 40, 9, 10, 0.35
NOTES = (
    "**binary + rescore** stays below 20x: beside the scan of the bits it reads "
    "the bytes of 1,024 candidates scattered over 51 MB, with cold caches between the other systems. 512 "
    "candidates would lower recall on captions to .98. Taking bits from the rows' mean raised recall from "
    ".995 to .998; plain arrays in place of numpy's memmap class made no difference that can be told."
)


def noisy(rows_ND: FloatRows, count: int, seed: int) -> FloatRows:
    """Draw rows with replacement and add noise; float32 [count, D], L2-normalised."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((count, rows_ND.shape[1]), dtype=np.float32)
    noise *= NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
    made = rows_ND[rng.integers(len(rows_ND), size=count)] + noise
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return np.ascontiguousarray(made, np.float32)


def vectors_and_queries(bundle: Path, index: Path) -> tuple[FloatRows, FloatRows]:
    """Make what is searched and what is asked."""
    with VectorIndex(index) as found:
        view = found.view()
        real = np.asarray(view.codes.exact, np.float32)
        texts = sorted(
            {str(text) for text in (m.metadata.get("text") for m in found.search(real[0], 5000)[0])}
        )
    asked = [str(text) for text in np.random.default_rng(1).choice(texts, QUERIES // 2, replace=False)]
    with open_bundle(bundle) as opened, Retriever(opened, threads=1) as retriever:
        words = retriever.embed_text(asked)
    return noisy(real, ROWS, 2), np.concatenate([words, noisy(real, QUERIES - len(words), 3)])


def filled(path: Path, vectors: FloatRows) -> float:
    """Write the index; return rows a second that were acknowledged, folds included."""
    create_index(path, IndexHeader(space="0" * 64, dimensions=vectors.shape[1]))
    began = time.perf_counter()
    with IndexWriter(path) as writer:
        for start in range(0, len(vectors), 4096):
            part = vectors[start : start + 4096]
            writer.add(
                [NewRow(id=f"row-{start + i}", metadata={"n": start + i}) for i in range(len(part))], part
            )
        writer.fold()
    return len(vectors) / (time.perf_counter() - began)


def peers(vectors: FloatRows) -> dict[str, Callable[[FloatRows], list[int]]]:
    """Return exact search by faiss, and usearch's over int8 and bits where it is installed."""
    import faiss

    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    found: dict[str, Any] = {"faiss FlatIP": lambda query: flat.search(query[None], K)[1][0].tolist()}
    try:
        from usearch.index import MetricKind, search
    except ImportError:
        return found
    scale = np.float32(127 / np.abs(vectors).max())
    coded, bits = np.rint(vectors * scale).astype(np.int8), np.packbits(vectors > 0, axis=1)

    def int8(query: FloatRows) -> list[int]:
        code = np.rint(query * (127 / np.abs(query).max())).astype(np.int8)
        return [int(key) for key in search(coded, code, K, MetricKind.IP, exact=True, threads=1).keys]

    def binary(query: FloatRows) -> list[int]:
        code = np.packbits(query > 0)
        near = search(bits, code, 1024, MetricKind.Hamming, exact=True, threads=1).keys.astype(np.int64)
        return [int(row) for row in near[np.argsort(-(vectors[near] @ query))[:K]]]

    return {**found, "usearch int8, exact": int8, "usearch bits + rescore": binary}


def searched(vectors: FloatRows, queries: FloatRows, path: Path) -> list[dict[str, Any]]:
    """Time every system in turn; return ratios to FlatIP by round, and recall."""
    with VectorIndex(path) as index:
        systems = peers(vectors)
        for precision in ("int8", "binary"):

            def ours(query: FloatRows, precision: str = precision) -> list[int]:
                return [int(match.metadata["n"]) for match in index.search(query, K, precision=precision)[0]]

            systems[f"edgeglm {precision}"] = ours
        exact = [set(systems["faiss FlatIP"](query)) for query in queries]
        recall = dict[str, float]()
        times: dict[str, list[float]] = {name: [] for name in systems}
        for name, answer in systems.items():
            recall[name] = statistics.fmean(
                len(set(answer(q)) & e) / K for q, e in zip(queries, exact, strict=True)
            )
        for _ in range(ROUNDS):
            for name, answer in systems.items():
                began = time.process_time()
                for query in queries:
                    answer(query)
                times[name].append((time.process_time() - began) / len(queries) * 1e3)
    rows = []
    for name, taken in times.items():
        ratios = [flat / own for flat, own in zip(times["faiss FlatIP"], taken, strict=True)]
        rows.append(
            {
                "system": name,
                "ratio": round(statistics.median(ratios), 2),
                "low": round(min(ratios), 2),
                "high": round(max(ratios), 2),
                "recall": round(recall[name], 4),
                "ms": round(statistics.median(taken), 3),
            }
        )
    return rows


def crashed() -> dict[str, Any]:
    """Run the crash test in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/index/test_crash.py", "-k", "fifty"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"kills": 50, "passed": result.returncode == 0}


def table(found: dict[str, Any]) -> str:
    """Return the tables as markdown."""
    by_name = {row["system"]: row for row in found["search"]}
    int8, binary, page = by_name["edgeglm int8"], by_name["edgeglm binary"], found["page"]
    paint, query = page["first_paint_ms"], page["query_to_pictures_ms"]
    rows = [
        (
            "int8 / FlatIP, speed",
            _spread(int8),
            "3x",
            "3.5x",
            _verdict(int8["ratio"] >= 3, int8["ratio"] >= 3.5),
        ),
        ("int8, recall@10", f"{int8['recall']:.3f}", ">= .98", "", _verdict(int8["recall"] >= 0.98)),
        (
            "binary + rescore / FlatIP, speed",
            _spread(binary),
            "10x",
            "20x",
            _verdict(binary["ratio"] >= 10, binary["ratio"] >= 20),
        ),
        (
            "binary + rescore, recall@10",
            f"{binary['recall']:.3f}",
            ">= .99",
            "",
            _verdict(binary["recall"] >= 0.99),
        ),
        (
            "kill -9 at 50 random moments: acknowledged changes lost, indexes corrupt",
            "0, 0" if found["crash"]["passed"] else "the test fails",
            "0, 0",
            "",
            _verdict(found["crash"]["passed"]),
        ),
        (
            "page, first paint on loopback, ms",
            f"{paint:.0f} (at most {page['first_paint_high_ms']:.0f})",
            "<= 500",
            "<= 250",
            _verdict(paint <= 500, paint <= 250),
        ),
        (
            "page, query to pictures of 5,000, ms",
            f"{query:.0f} (at most {page['query_to_pictures_high_ms']:.0f})",
            "<= 100",
            "<= 50",
            _verdict(query <= 100, query <= 50),
        ),
    ]
    return "\n".join(
        [
            "# The index and the search page",
            "",
            f"Made by `{found['command']}` on {found['machine']}: "
            + "; ".join(
                f"{name} at commit {of['commit']}, beside other work of load {of['load']}"
                for name, of in found["made"].items()
            )
            + f". {found['vectors']}",
            "",
            "| what | measured | reach | beyond | result |",
            "| --- | --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"All systems over the same vectors, one query at a time on one thread, median of {ROUNDS} "
            "interleaved rounds with the lowest and the highest, in CPU time: the machine had other work. "
            "`edgeglm` is the whole of `VectorIndex.search`: looking for changes on disk, the scan, exact "
            "scores for the candidates, and the results with their metadata.",
            "",
            "| system | times as fast as FlatIP | recall@10 | CPU ms |",
            "| --- | --- | ---: | ---: |",
            *(
                f"| {row['system']} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) "
                f"| {row['recall']:.3f} | {row['ms']:.2f} |"
                for row in found["search"]
            ),
            "",
            NOTES,
            "",
            f"Of a query on the page, embedding takes {page['of_it_ms']['embedding']} ms, search "
            f"{page['of_it_ms']['search']} ms, fetching the pictures and the way "
            f"{page['of_it_ms']['pictures and way']} ms; decoding is the rest. "
            "Server and browser share the two cores with each other and with the other work.",
            "",
            f"Written at {found['rows_per_second']:,.0f} rows a second, "
            "each batch of 4,096 synced before the next.",
            "",
        ]
    )


def _spread(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.1f}x ({row['low']:.1f} to {row['high']:.1f})"


def _verdict(reached: bool, beyond: bool = False) -> str:
    return "beyond" if beyond else "reached" if reached else "falls short"


def parts(bundle: Path, index: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what can be measured by itself: each gives some of the document."""

    def search() -> dict[str, Any]:
        vectors, queries = vectors_and_queries(bundle, index)
        with tempfile.TemporaryDirectory() as scratch:
            rate = filled(Path(scratch) / "index", vectors)
            rows = searched(vectors, queries, Path(scratch) / "index")
        words = (
            f"{ROWS:,} vectors of {vectors.shape[1]} dimensions: embeddings of 5,000 real pictures, drawn "
        )
        words += (
            f"with replacement, with Gaussian noise of {NOISE} times their length; {QUERIES} queries, half "
        )
        words += "captions through the text tower, half noisy pictures."
        return {"vectors": words, "search": rows, "rows_per_second": round(rate)}

    return {
        "search": search,
        "crash": lambda: {"crash": crashed()},
        "page": lambda: {"page": page_measured(bundle, index)},
    }


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("index", type=Path)
    parser.add_argument("--only", choices=("search", "crash", "page"), help="Keep the other parts.")
    given = parser.parse_args()
    place = OUT / "index.json"
    found = json.loads(place.read_bytes()) if given.only else {}
    made = found.setdefault("made", {})
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for name, measured in parts(given.bundle, given.index).items():
        if given.only in (None, name):
            load = round(os.getloadavg()[0], 1)
            found.update(measured())
            made[name] = {"commit": commit, "load": load}
    found["command"] = "scripts/bench/index.py BUNDLE INDEX"
    found["machine"] = f"{os.cpu_count()} shared {platform.machine()} CPU cores"
    OUT.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n")
    (OUT / "index.md").write_text(table(found))
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
