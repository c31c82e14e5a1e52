"""The readable tables of docs/bench/fusion.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

ROUNDS = 15
#: Of a report: the model, its INT8 file, and the one whose residual sums read INT8.
_FILES = ("FP32", "INT8", "INT8, residuals")
_NAMED = 2  # nodes named of those that prevent the same for the same reason


def page(data: Mapping[str, Any]) -> str:
    """Return the page in Markdown; what was not measured yet is left out."""
    lines = [
        "# Graph passes",
        "",
        "`scripts/bench/fusion.py --bundle BUNDLE`; each table names its commit and machine.",
    ]
    for part, section in (
        ("speed", _speed),
        ("lanes", _lanes),
        ("lanes", _int8),
        ("reports", _reports),
        ("overflows", _overflows),
    ):
        if part in data:
            lines += section(data)
    return "\n".join(lines) + "\n"


def _speed(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "## Fused graphs in ONNX Runtime",
        "",
        "Peers: the graph as exported, whose session fuses what it knows, and `onnxruntime.transformers`. "
        f"Medians of {ROUNDS} interleaved rounds, CPU time of the one thread that computes, as ratios: above "
        f"1 is faster than the graph as exported. {_stamp(data['speed'].values())}",
        "",
        "| model | rewritten | batch 1: ours | batch 1: transformers | batch 8: ours | batch 8: transformers "
        "| largest difference |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    )
    for name, row in data["speed"].items():
        made = ", ".join(f"{count} {kind}" for kind, count in row["made"].items()) or "nothing"
        cells = [f"{row[f'batch {b}'][who]:.2f}x" for b in (1, 8) for who in ("rewritten", "transformers")]
        yield f"| {name} | {made} | {' | '.join(cells)} | {row['max_abs']:.1e} |"
    yield from (
        "",
        "Rows where nothing was rewritten hold the same graph twice: what they differ from 1 is noise. On a "
        "CPU the session fuses most of it itself, so that little is left to win.",
    )


def _lanes(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "## Lanes",
        "",
        "Lane A: opset 16, FP32. Lane B: opset 19 or 20, FP16 by AutoCast after the lint. Differences are "
        "those of unit embeddings. Engines: TensorRT-RTX for SM 8.6, built without a GPU; no TensorRT 8.5 "
        "was at hand, so that lane A is held against its parser's operator table. "
        f"{_stamp(data['lanes'].values())}",
        "",
        "| model | lane A: nodes rewritten | kept in FP32 | seconds | difference | engine "
        "| lane B: difference | cosine | engine |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    )
    for name, row in data["lanes"].items():
        a, b = row["A"], row["B"]
        yield (
            f"| {name} | {a['rewritten']} | {a['fp32_nodes']} | {a['seconds']} | {a['max_abs']:.1e} "
            f"| {a['engine']} | {b['max_abs']:.1e} | {b['min_cosine']:.6f} | {b['engine']} |"
        )


def _overflows(data: Mapping[str, Any]) -> Iterator[str]:
    rows = data["overflows"]["rows"]
    found = sum(row["found"] for row in rows)
    broken = sum(row["plain_cast_cosine"] < 0.99 for row in rows)
    mended = sum(row["mended_cosine"] > 0.999 for row in rows)
    yield from (
        "",
        "## Planted FP16 overflows",
        "",
        f"Found {found} of {len(rows)}; the plain cast breaks {broken}, {mended} answer as FP32 after the "
        "lint. Cosine to FP32 of the worst row, 0 for NaN or infinity. onnxruntime.transformers.float16 "
        f"clamps constants to what FP16 holds. {_stamp([data['overflows']])}",
        "",
        "| planted | found | plain cast | onnxruntime.transformers.float16 | lint, then AutoCast |",
        "| --- | --- | ---: | ---: | ---: |",
        *(
            f"| {row['planted']} | {'yes' if row['found'] else 'no'} | {row['plain_cast_cosine']:.4f} "
            f"| {row['onnxruntime_cosine']:.4f} | {row['mended_cosine']:.4f} |"
            for row in rows
        ),
    )


def _int8(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "INT8 Q/DQ by ModelOpt, every product, FP16 besides (lane B), lowered to FP32 and Q/DQ (lane A), "
        "and with residual sums that read INT8 where an INT8 product reads their other side anyway. Ranges "
        "are of random inputs of ordinary size, so that this says what files keep of each other and nothing "
        "of a task. Cosines are those of the worst row to FP32; lanes round other values, and differ by "
        "about what both lose.",
        "",
        "| model | INT8 nodes | lane A: opset | tensors with Q/DQ | cosine | lane B: cosine | engine "
        "| A to B: cosine | residual sums in INT8: cosine | engine |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    )
    for name, row in data["lanes"].items():
        found = row["int8"]
        a, b, sums = found["A"], found["B"], found["residuals"]
        yield (
            f"| {name} | {found['nodes']} | {a['opset']} | {a['quantized']} | {a['min_cosine']:.4f} "
            f"| {b['min_cosine']:.4f} | {b['engine']} | {found['apart']:.4f} | {sums['min_cosine']:.4f} "
            f"| {sums['engine']} |"
        )


def _reports(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        "",
        "## What runtimes fuse of real models",
        "",
        "`edgeglm fusions`: ONNX Runtime was asked, TensorRT is judged by its documentation. Fused of found. "
        f"{_stamp(data['reports'].values())}",
        "",
        "| model | file | ONNX Runtime | TensorRT |",
        "| --- | --- | --- | --- |",
    )
    for name, by_precision in data["reports"].items():
        for precision in _FILES:
            counts = by_precision[precision]["counts"]
            cells = [
                ", ".join(f"{pattern} {done}/{every}" for pattern, (done, every) in counts[runtime].items())
                for runtime in ("onnxruntime", "tensorrt")
            ]
            yield f"| {name} | {precision} | {' | '.join(cell or '-' for cell in cells)} |"
    yield from (
        "",
        "Missed, and the node that prevents it:",
        "",
        "| model | file | runtime | pattern | how often | prevented by | why |",
        "| --- | --- | --- | --- | ---: | --- | --- |",
    )
    for name, by_precision in data["reports"].items():
        for precision in _FILES:
            for row in by_precision[precision]["missed"]:
                nodes = row["prevented_by"]
                named = ", ".join(f"`{node}`" for node in nodes[:_NAMED])
                more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
                yield (
                    f"| {name} | {precision} | {row['runtime']} | {row['pattern']} | {len(nodes)} "
                    f"| {named}{more} | {row['why']} |"
                )


def _stamp(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the commits and machines of some rows, in words."""
    found = dict.fromkeys(f"At {row['commit']}, {row['machine']}." for row in rows)
    return " ".join(found)
