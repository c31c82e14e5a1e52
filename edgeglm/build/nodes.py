"""A stage in a plan, and what it takes from the stages before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeglm.core.artifact import Artifact
from edgeglm.core.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Node:
    """One stage of a plan. ``needs`` maps the names of its inputs to earlier stages or sources.

    ``per_target`` says whether the target is part of its key, and so of its place in the history.
    """

    stage: Stage[Any]
    needs: Mapping[str, str]
    per_target: bool = False

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    def inputs(self, known: Mapping[str, Artifact]) -> dict[str, Artifact] | None:
        """Return its inputs of what is fetched and made; None where something is not yet."""
        if any(origin not in known for origin in self.needs.values()):
            return None
        return {name: known[origin] for name, origin in self.needs.items()}
