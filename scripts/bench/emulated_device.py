"""The device half on another architecture: made, finalized and asked, with the whole log kept.

    .venv/bin/python scripts/bench/emulated_device.py BUNDLE [FOLDER]

Makes a Debian arm64 root with scripts/emulated-device in FOLDER (a temporary one by default; one that is
there already is used), finalizes BUNDLE in it and asks it one question, offline. Resolves the locks with
scripts/aarch64-wheels. Writes docs/bench/emulated-device.json, .log and the first part of .md; what the .md
says of deploying stays.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "docs" / "bench"
QUERY = "a red apple"
KEPT_FROM = "## Deployed to"
_OF_THE_INDEX = "WARNING: Location "
_KEPT = ("bundle", "board", "chosen", "library_version", "candidates")


class Log:
    """Everything that was run and said, with this machine's paths taken out."""

    def __init__(self, hidden: dict[str, str]) -> None:
        self._hidden = hidden
        self.lines: list[str] = []

    def run(self, command: list[str], *, json_out: bool = False) -> tuple[str, float]:
        """Run a command of this checkout, keep its words, and return its stdout and seconds."""
        self.lines.append(f"$ {self.plain(' '.join(command))}")
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        said = done.stderr + (json.dumps(json.loads(done.stdout), indent=1) if json_out else done.stdout)
        self.lines += [*self.plain(said).splitlines(), f"[exit {done.returncode}, {seconds:.1f} s]", ""]
        if done.returncode:
            sys.stderr.write("\n".join(self.lines))
            raise SystemExit(f"error: {command[0]} failed with {done.returncode}; read what it said above")
        return done.stdout, seconds

    def plain(self, text: str) -> str:
        """Return the text with names in the place of paths, and without where this machine's index lies."""
        for path, name in self._hidden.items():
            text = text.replace(path, name)
        return "\n".join(line for line in text.splitlines() if not line.startswith(_OF_THE_INDEX))


def rows(receipt: dict[str, Any]) -> list[str]:
    """Return the table of the candidates."""
    lines = [
        "| variant | worst cosine, pictures | worst cosine, texts | top rows agree | self-test |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for one in receipt["candidates"]:
        test = one["selftest"]
        if test is None:
            lines.append(f"| {one['variant']} | - | - | - | {one['status']}: {one['reason']} |")
            continue
        lines.append(
            f"| {one['variant']} | {test['image_cosine_min']:.6f} | {test['text_cosine_min']:.6f} "
            f"| {test['top_k_agreement']:.0%} of {test['top_k']} | {one['status']} |"
        )
    return lines


_PAGE = """\
# The device half on aarch64, without a board

`{command}` at commit {commit}, {machine}. Debian 12's arm64 userland under qemu-user as a
Cortex-A72, Python 3.11, edgeglm's own wheel and the other wheels for aarch64, no network and no GPU.
Everything that was run and said, but for pip's words on this machine's package index, is in
[emulated-device.log](emulated-device.log).

The bundle `{bundle}` ({bundle_mb} MB) went from raw pictures and texts through decoding, resizing,
tokenising and the towers, and was held against what x86-64 had made of them.

{rows}

The root was made in {make} s, finalize took {finalize} s and `edgeglm run --query "{query}"` {run} s; it used
{words} and found: {found}. Latencies under an emulator say nothing and are left out.

`scripts/aarch64-wheels`: the locks of the device half, resolved with their hashes for JetPack 6 and 7, and
what checks signatures there:

{wheels}

What fell short: ONNX Runtime crashes under qemu when it reads the host's `/sys` for caches, so the script
hides that; the userland is Debian's with Python 3.11, not JetPack's with 3.10 or 3.12, for which the wheels
alone are checked.

{kept}"""


def page(result: dict[str, Any], kept: str) -> str:
    """Return the document."""
    receipt, answer = result["receipt"], result["answer"]
    text = _PAGE.format(
        **{name: result[name] for name in ("command", "commit", "machine", "bundle_mb")},
        **result["seconds"],
        bundle=receipt["bundle"],
        rows="\n".join(rows(receipt)),
        query=QUERY,
        words=answer["words"],
        found=", ".join(answer["found"]),
        wheels="\n".join(f"- {line}" for line in result["wheels"]),
        kept=kept,
    )
    return text.rstrip() + "\n"


def main(arguments: list[str]) -> int:
    """Make, finalize, ask, write."""
    if not arguments:
        sys.stderr.write(__doc__ or "")
        return 2
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        device = Path(arguments[1] if len(arguments) > 1 else scratch, "device").absolute()
        bundle = device.parent / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(arguments[0], bundle)
        shutil.rmtree(bundle.with_name("bundle.finalized"), ignore_errors=True)
        log = Log({str(device): "FOLDER", str(bundle): "BUNDLE", str(ROOT): ".", str(Path.home()): "~"})
        make = [str(ROOT / "scripts/emulated-device"), str(device)]
        _, made = log.run(make)
        finalize = [*make, "edgeglm", "finalize", str(bundle), "--rounds", "7", "--json"]
        said, finalized = log.run(finalize, json_out=True)
        receipt = json.loads(said)
        ask = [*make, "edgeglm", "run", str(bundle), "--query", QUERY, "--json"]
        said, asked = log.run(ask, json_out=True)
        answer = json.loads(said)
        wheels, _ = log.run([str(ROOT / "scripts/aarch64-wheels")])
        size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    result = {
        "command": "scripts/bench/emulated_device.py BUNDLE",
        "commit": commit,
        "machine": f"x86-64 host, {os.cpu_count()} cores, other work running",
        "bundle_mb": round(size / 1e6, 1),
        "seconds": {"make": round(made), "finalize": round(finalized), "run": round(asked)},
        "receipt": {name: receipt[name] for name in _KEPT},
        "answer": {"words": answer["through"], "found": [hit["text"] for hit in answer["hits"][:5]]},
        "wheels": wheels.splitlines(),
    }
    document = OUT / "emulated-device.md"
    before = document.read_text("utf-8") if document.exists() else ""
    kept = KEPT_FROM + before.split(KEPT_FROM, 1)[1] if KEPT_FROM in before else ""
    (OUT / "emulated-device.json").write_text(json.dumps(result, indent=1) + "\n")
    (OUT / "emulated-device.log").write_text("\n".join(log.lines) + "\n")
    document.write_text(page(result, kept))
    sys.stdout.write("\n".join(log.lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
