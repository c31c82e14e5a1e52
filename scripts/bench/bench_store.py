"""What the benches share: the newest artifact of a kind, and where a figure was made."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
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
    """Return the commit and the kind of machine."""
    said = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": f"{os.cpu_count()} shared {platform.machine()} CPU cores",
    }


def interval(values: Sequence[float]) -> str:
    """Return the mean with the half width of its 95 % interval over seeds (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"
