"""What graph passes did to a model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Rewritten:
    """What the passes did: kind -> names of the nodes that a pattern became, and why others stayed."""

    made: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def count(self, kind: str) -> int:
        """How many patterns of a kind were rewritten."""
        return len(self.made.get(kind, ()))
