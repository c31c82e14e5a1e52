"""A command line that makes a bundle, worked out from its recipe: a shipped one and what differs from it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import msgspec

from edgeglm.build.shipped import DEFAULT, known_recipes, load_recipe, own_gates
from edgeglm.build.student_budget import Asked
from edgeglm.build.student_search import TRIALS
from edgeglm.core.recipe import Recipe, toml_tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SIDE = "student.resolution"
#: With more differences than these the recipe itself, which the bundle holds, is shorter to give.
MOST_SETTINGS = 8


def own_name(path: PurePath) -> str:
    """Return the name of a recipe of one's own data."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64] or "own"


def command_of(recipe: Recipe, target: str, asked: Asked | None = None) -> str:
    """Return a command line that gives this recipe for a target, as a shell takes it.

    Several do, such as one with a recipe of one's own: this is the one nearest to a shipped recipe. Where
    a search was ``asked`` to choose the student, it is asked again.
    """
    path = None if recipe.data.path is None else PurePath(recipe.data.path)
    source = "folder" if path is None or path.suffix != ".parquet" else "parquet"
    own = path is not None and recipe.name == own_name(path) and recipe.data.source == source
    found = {name: _settings(_based_on(name, recipe, own=own), recipe, asked) for name in known_recipes()}
    usable = {name: lines for name, lines in found.items() if lines is not None}
    budget = [] if asked is None else asked.options(usual_trials=TRIALS)
    words = ["edgeglm", "build", "--target", target]
    best = min(usable, key=lambda name: (len(usable[name]), name != DEFAULT, name), default=None)
    if best is None or len(usable[best]) > MOST_SETTINGS:
        words += ["--recipe", "recipe.toml"]
        if asked is None or (recipe.student.resolution != asked.resolution and not asked.fixed):
            return shlex.join(words)  # it holds the chosen student, about whose side a search would go on
        fixed = ["--set", f"{_SIDE}={asked.resolution}"] if asked.fixed else []
        return shlex.join([*words, *budget, *fixed])
    if best != DEFAULT:
        words += ["--recipe", best]
    if own:
        words += ["--data", str(path)]
    if recipe.data.skip_bad:
        words.append("--skip-bad")
    return shlex.join([*words, *budget, *(word for line in usable[best] for word in ("--set", line))])


def _based_on(name: str, recipe: Recipe, *, own: bool) -> Recipe:
    """Return a shipped recipe with what options other than ``--set`` make of it."""
    base = load_recipe(name)
    data = msgspec.structs.replace(base.data, skip_bad=recipe.data.skip_bad)
    if own:
        data = msgspec.structs.replace(data, source=recipe.data.source, path=recipe.data.path)
        base = msgspec.structs.replace(base, name=recipe.name, gates=own_gates(base.gates))
    return msgspec.structs.replace(base, data=data)


def _settings(base: Recipe, recipe: Recipe, asked: Asked | None) -> list[str] | None:
    """Return what ``--set`` must say; None where something is taken away, which it cannot.

    A search chooses the student's size, and its side too unless that was set: setting it would fix it.
    """
    old, new = (dict(_leaves(toml_tree(one))) for one in (base, recipe))
    for leaves in (old, new):
        leaves.pop("description", None)
        if asked is not None:
            leaves.pop("student.size")
    if old.keys() - new.keys():
        return None
    if asked is not None:
        new[_SIDE] = asked.resolution
        if asked.fixed:
            del old[_SIDE]
        elif old[_SIDE] != asked.resolution:
            return None
    return [f"{key}={_value(value)}" for key, value in new.items() if key not in old or old[key] != value]


def _leaves(tree: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def _value(value: Any) -> str:
    """Write a value as ``--set`` reads it: TOML, or a bare word."""
    if isinstance(value, str):
        try:
            tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            if value == value.strip():
                return value
    return json.dumps(value, ensure_ascii=False)
