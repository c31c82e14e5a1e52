"""What the stages of a recipe read from outside: fetched assets and the user's own files, by room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeglm.adapt.pretraining_stage import pretraining_assets, pretraining_files
from edgeglm.adapt.sources import teacher_assets
from edgeglm.adapt.targets import require_targets
from edgeglm.assets.fetch import fetch_asset, is_fetched
from edgeglm.core.artifact import Artifact
from edgeglm.core.progress import Progress
from edgeglm.core.recipe import Recipe
from edgeglm.core.store import Store
from edgeglm.data.auxiliary import auxiliary_assets
from edgeglm.data.sources import pairs_assets, pairs_inputs

#: Room -> name of an input -> what is fetched for it.
Rooms = Mapping[str, Mapping[str, str]]
#: Room -> name of an input -> name of the source. A stage of that room takes all of them.
Needs = Mapping[str, Mapping[str, str]]
TEXT = "teacher:text"


@dataclass(frozen=True, kw_only=True)
class Sources:
    """``found`` are artifacts by the name of the source; ``absent``, specs of what is not here."""

    needs: Needs
    found: Mapping[str, Artifact]
    absent: Mapping[str, str] = field(default_factory=dict)


def teacher_rooms(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return what is fetched for a teacher."""
    return {
        "data": pairs_assets(recipe.data),
        "teacher": teacher_assets(recipe.teacher),
        "reading": pretraining_assets(recipe.teacher),
        "auxiliary": auxiliary_assets(recipe.teacher.auxiliary.icons),
    }


def sources_of(
    recipe: Recipe, rooms: Rooms, store: Store, progress: Progress, *, download: bool = True
) -> Sources:
    """Hash the user's own files, then fetch the assets of ``rooms``, or only find those that are here.

    Raises:
        UserError: Something cannot be read or fetched, or the teacher's text tower has no such layers.
    """
    needs = {
        room: {name: f"{room}:{name}" for name in assets if f"{room}:{name}" != TEXT}
        for room, assets in rooms.items()
    }
    own = {"reading": pretraining_files(recipe.teacher)}
    if recipe.data.source != "icons":
        own["data"] = pairs_inputs(recipe.data, store, progress)
    found, absent = dict[str, Artifact](), dict[str, str]()
    for room, files in own.items():
        for name, artifact in files.items():
            found[needs[room].setdefault(name, f"{room}:{name}")] = artifact
    for room, assets in rooms.items():
        for name, spec in assets.items():
            if download or is_fetched(spec, store):
                found[f"{room}:{name}"] = fetch_asset(spec, store, progress)
            else:
                absent[f"{room}:{name}"] = spec
    if TEXT in found:
        require_targets(recipe.teacher, found[TEXT])
    return Sources(needs=needs, found=found, absent=absent)
