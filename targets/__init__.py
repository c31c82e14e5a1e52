"""Where a bundle runs: the profile of each device, its schema, and what is legal on it."""

from __future__ import annotations

if __name__ != "edgeglm.targets":
    raise ImportError(
        f"import edgeglm.targets, not {__name__}: the top-level folder is not a package of its own"
    )
