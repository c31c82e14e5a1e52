"""What the benches share: their options, the newest artifact of a kind, and where a figure was made."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeglm.core.store import Store

ROOT = Path(__file__).resolve().parents[2]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


class CachedText:
    """Looks features of texts up that a frozen tower made once."""

    def __init__(self, texts: list[str], features_TF: Any) -> None:
        self.place = {text: i for i, text in enumerate(texts)}
        self.features_TF = features_TF
        self.width = features_TF.shape[1]

    def all_features(self, texts: Any) -> Any:
        """Return the rows of the given texts."""
        return self.features_TF[[self.place[text] for text in texts]]


def newest(store: Store, kind: str) -> Any:
    """Return the artifact of a kind that was used last."""
    found = [entry for entry in store.entries() if entry.kind == kind]
    if not found:
        raise SystemExit(f"no {kind} in {store.root}: build the recipe `default` with that store first")
    return store.get(max(found, key=lambda entry: entry.last_used).key)


def origin() -> dict[str, str]:
    """Return the commit, ``$EDGEGLM_COMMIT`` where there is no git, and the kind of machine."""
    said = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(said, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": found or os.environ["EDGEGLM_COMMIT"],
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores, torch {version('torch')}",
    }


def bench_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the bench's own docstring, line by line."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Ask how many seeds a table of teachers takes, where it keeps features, or for the table alone."""
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path(os.environ.get("TMPDIR", "/tmp")))
    parser.add_argument("--table", action="store_true", help="only write the table anew")


def add_share(parser: argparse.ArgumentParser, output: Path) -> None:
    """Let a machine of many cores make a table in several processes, a share of the runs each."""
    parser.add_argument("--share", default="0/1", help="I/N: only every N-th run from the I-th on")
    parser.add_argument("--output", type=Path, default=output, help="folder of the figures")
    parser.add_argument(
        "--merge", type=Path, nargs="*", default=(), help="figures of shares to take in first"
    )


class Share:
    """Counts runs, and says of each whether it is of this share."""

    def __init__(self, said: str) -> None:
        self.mine, self.of = map(int, said.split("/"))
        self.count = -1

    def takes(self) -> bool:
        """Return whether the next run is ours."""
        self.count += 1
        return self.count % self.of == self.mine


def kept_figures(path: Path, shares: Sequence[Path]) -> dict[str, Any]:
    """Return the figures at a path, with those of shares taken in, or none yet."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for share in shares:
        _take_in(found, json.loads(share.read_text()))
    return found


def _take_in(found: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            _take_in(found[name], value)
        else:
            found[name] = value


def interval(values: Sequence[float]) -> str:
    """Return the mean with the half width of its 95 % interval over seeds (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"
