"""What each stage was last made from, so that ``edgeglm explain`` can name the input that changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeglm.build.nodes import Node
from edgeglm.build.pipeline import Plan
from edgeglm.core.artifact import Artifact
from edgeglm.core.stage import changes
from edgeglm.core.store import Store

FOLDER = "history"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One stage of a plan: whether the store has it, and if not, why it must run."""

    stage: str
    state: Literal["reused", "runs", "waits"]
    reasons: tuple[str, ...] = ()
    seconds: float | None = None


def remember(root: Path, plan: Plan, node: Node, artifact: Artifact) -> None:
    """Record what a stage was made from. A history that cannot be written is no reason to fail."""
    with suppress(OSError):
        path = _path(root, plan, node)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(artifact.provenance["key"], sort_keys=True))
        partial.replace(path)


def explain(plan: Plan, store: Store) -> list[Explanation]:
    """Say for each stage whether it would be reused, and if not, which of its inputs changed.

    A stage after one that must run is named with that stage: its key is known only when its inputs are.
    So it is with one whose downloads are not in the store.
    """
    made: dict[str, Artifact] = {}
    found = []
    for node in plan.nodes:
        inputs = plan.inputs_of(node, made)
        if inputs is None:
            missing = sorted(o for o in node.needs.values() if o not in made and o not in plan.sources)
            after = ", ".join(name for name in missing if name not in plan.absent)
            fetches = ", ".join(plan.absent[name] for name in missing if name in plan.absent)
            said = (after and f"after {after}", fetches and f"not downloaded yet: {fetches}")
            reasons = tuple(filter(None, said))
            found.append(Explanation(stage=node.name, state="waits", reasons=reasons))
            continue
        parts = node.stage.key_parts(inputs)
        artifact = store.get(node.stage.key(inputs))
        if artifact is not None:
            made[node.name] = artifact
            seconds = float(artifact.provenance["seconds"])
            found.append(Explanation(stage=node.name, state="reused", seconds=seconds))
            continue
        before = _before(store.root, plan, node)
        now = json.loads(json.dumps(parts))  # as it would be read back: a tuple is a list there
        reasons = tuple(changes(before, now)) if before is not None else ("never made with this recipe",)
        found.append(
            Explanation(stage=node.name, state="runs", reasons=reasons or ("its artifact left the store",))
        )
    return found


def _path(root: Path, plan: Plan, node: Node) -> Path:
    target = f"@{plan.target.name}" if node.per_target else ""
    return root / FOLDER / f"{plan.recipe.name}.{node.name}{target}.json"


def _before(root: Path, plan: Plan, node: Node) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = json.loads(_path(root, plan, node).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found
