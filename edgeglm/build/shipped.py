"""The recipes that ship, and how a recipe is named on the command line."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.core.errors import unknown_name
from edgeglm.core.recipe import GateConfig, Recipe, recipe_from_file, recipe_from_toml

DEFAULT = "default"


def known_recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    folder = resources.files("edgeglm.build") / "recipes"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Return a shipped recipe by name, or the user's own by a path that ends in ``.toml``.

    Args:
        name_or_path: Name or path.
        overrides: ``section.key=value`` each, applied in order.

    Raises:
        UserError: Unknown name (with the nearest one), missing file, unknown key, wrong type.
    """
    if name_or_path.endswith(".toml"):
        return recipe_from_file(Path(name_or_path), overrides=overrides)
    if name_or_path not in known_recipes():
        remedy = "use one of those, or give the path of your own .toml file"
        raise unknown_name("recipe", name_or_path, known_recipes(), remedy)
    text = (resources.files("edgeglm.build") / "recipes" / f"{name_or_path}.toml").read_text("utf-8")
    return recipe_from_toml(text, origin=f"shipped recipe {name_or_path}.toml", overrides=overrides)


def own_gates(gates: GateConfig, kept: Collection[str] = ()) -> GateConfig:
    """Return a shipped recipe's gates for one's own data, but for the keys that are ``kept``.

    The teacher's floor is that of the shipped data, and a few queries make a ratio uncertain.
    """
    relaxed: dict[str, Any] = {"teacher_map10": 0.0, "judge": "interval"}
    return msgspec.structs.replace(gates, **{key: value for key, value in relaxed.items() if key not in kept})
