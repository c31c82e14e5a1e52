"""The recipe: a TOML file that says what to make. Every field here is a field a user can set."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.reranker_config import RerankerConfig
from edgeglm.core.section import Count, Fraction, Positive, Rate, Section, Seed
from edgeglm.core.student_config import LossesConfig, StudentConfig
from edgeglm.core.teacher_config import AuxiliaryConfig, DomainConfig, OptimisationConfig, TeacherConfig

__all__ = [
    "AuxiliaryConfig", "DataConfig", "DomainConfig", "EngineConfig", "ExportConfig", "GateConfig",
    "LossesConfig", "OptimisationConfig", "PackConfig", "QuantizeConfig", "Recipe", "RerankerConfig",
    "Section", "StudentConfig", "TeacherConfig", "recipe_from_file", "recipe_from_toml", "toml_tree",
]  # fmt: skip

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Language = Literal["en", "zh"]


class DataConfig(Section, frozen=True, kw_only=True):
    """Where the image-text pairs come from and how they are split.

    ``source = "icons"`` fetches the founding icon sets; ``"folder"`` reads ``path/pairs.jsonl``;
    ``"parquet"`` reads the file at ``path`` with the columns ``image`` and ``text``. Lines or rows of one's
    own data may say ``category`` and ``subcategory``, and those without a text are unlabelled; ``categories``
    takes the groups and subgroups that Unicode puts emoji into for those of the icons.
    ``language`` says which names and keywords the icons have: English names are the icon sets' own, Chinese
    ones Unicode's (CLDR). With several, every name is a caption, and each language has tracks of its own.
    ``margin`` is the share of the side that stays background on each side of a picture, where it is
    measured and on a device, so that it is as large as its augmented views are on average (FixRes, Touvron et
    al., 2019).
    """

    source: Literal["icons", "folder", "parquet"] = "icons"
    path: str | None = None
    labelled: tuple[str, ...] = ("noto", "openmoji", "fluent-emoji-flat", "emojione")
    target: str | None = "twemoji"
    concepts: Positive | None = None
    image_size: Positive = 144
    margin: Annotated[float, msgspec.Meta(ge=0.0, le=0.4)] = 0.05
    unseen_fraction: Fraction = 0.1
    inductive_fraction: Fraction = 0.5
    skip_bad: bool = False
    categories: bool = False
    language: Language | tuple[Language, ...] = "en"

    def languages(self) -> tuple[Language, ...]:
        """Return the languages, each once, in the recipe's order."""
        return (self.language,) if isinstance(self.language, str) else tuple(dict.fromkeys(self.language))


class ExportConfig(Section, frozen=True, kw_only=True):
    """How the towers become ONNX."""

    opset: Annotated[int, msgspec.Meta(ge=18, le=24)] = 20
    parity_atol: Rate = 1e-4


class QuantizeConfig(Section, frozen=True, kw_only=True):
    """Which candidates are made and on how many calibration samples.

    Where both towers whole in INT8 fail the gate, they first learn on for ``qat_steps`` steps each while they
    are rounded (quantization-aware distillation; 0 for never), and are tried again. Where that fails too,
    ``search_evaluations`` lets the build search each tower's plan on the task's metric, measuring so many
    files at most. ``image_plan`` and ``text_plan`` are paths of plans to apply instead of both.
    """

    candidates: tuple[Literal["fp16", "int8"], ...] = ("fp16", "int8")
    calibration_samples: Annotated[int, msgspec.Meta(ge=2)] = 128  # of one there is no range
    image_policy: str = "linear-and-conv"
    text_policy: str = "expanding"
    qat_steps: Count = 200
    search_evaluations: Count = 12
    image_plan: str = ""
    text_plan: str = ""


class GateConfig(Section, frozen=True, kw_only=True):
    """Below these the build stops (teacher, student) or a candidate is left out (quantized).

    ``judge = "interval"`` lets a build go on whose ``student_ratio`` is missed by less than chance: the
    upper end of its 95 % interval, over the very queries, reaches the gate. With twenty queries of one's
    own a single one of them moves the ratio by a twentieth. A shipped recipe has it on for ``--data``.
    """

    teacher_map10: Fraction = 0.0
    student_ratio: Fraction = 0.96
    quantized_ratio: Fraction = 0.99
    judge: Literal["value", "interval"] = "value"


class EngineConfig(Section, frozen=True, kw_only=True):
    """What the builder of engines is asked for besides, on every device of the target that has one.

    What is not given stays as the target's own table ``[engine]`` says, and that may say nothing. The keys
    are those of ``edgeglm.targets.build_options.BuildOptions``, where each is explained; a device of the
    target that grants one of them under no release stops the build. ``usual_batch`` is what an engine is
    tuned for, ``largest_batch`` the most that it takes at once; a text's length is ``student.max_length``.
    ``bucket_batches`` get a profile, a context and a CUDA graph each.
    """

    version_compatible: bool | None = None
    hardware_compatible: bool | None = None
    refit: bool | None = None
    weight_streaming: bool | None = None
    workspace_bytes: Annotated[int, msgspec.Meta(ge=1 << 20)] | None = None
    optimization_level: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None
    usual_batch: Annotated[int, msgspec.Meta(ge=1)] | None = None
    largest_batch: Annotated[int, msgspec.Meta(ge=32)] | None = None
    bucket_batches: tuple[Annotated[int, msgspec.Meta(ge=1)], ...] | None = None


class PackConfig(Section, frozen=True, kw_only=True):
    """What the bundle looks like."""

    archive: Literal["none", "tar.zst", "zip"] = "none"
    thumbnails: Positive = 96
    goldens: Positive = 8


class Recipe(Section, frozen=True, kw_only=True):
    """One whole recipe. ``name`` and ``description`` change nothing that is computed."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "default"
    description: str = ""
    seed: Seed = 0
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    reranker: RerankerConfig = RerankerConfig()
    export: ExportConfig = ExportConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    engine: EngineConfig = EngineConfig()
    gates: GateConfig = GateConfig()
    pack: PackConfig = PackConfig()


def recipe_from_toml(text: str, *, origin: str, overrides: Iterable[str] = ()) -> Recipe:
    """Parse a recipe and apply ``ns.key=value`` overrides. Raises UserError that names the key and its place.

    The place is ``origin`` or the override that brought the mistake in.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not TOML: {error}; mend that line") from error
    given = list(overrides)
    for override in given:
        _apply_override(tree, override)
    try:
        return msgspec.convert(tree, Recipe)
    except msgspec.ValidationError as error:
        raise _explained(error, _blamed(text, given) or origin) from error


def recipe_from_file(path: Path, *, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file. Relative paths in it are taken from the file's own folder."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}; give the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}; give a readable UTF-8 TOML file") from error
    recipe = recipe_from_toml(text, origin=str(path), overrides=overrides)
    data, teacher, folder = recipe.data, recipe.teacher, path.parent
    read = teacher.pretraining
    if data.path is not None:
        data = msgspec.structs.replace(data, path=str((folder / data.path).resolve()))
    teacher = msgspec.structs.replace(
        teacher,
        image=tuple(_beside(name, folder) for name in teacher.image),
        text=_beside(teacher.text, folder),
        pretraining=msgspec.structs.replace(
            read,
            corpus=tuple(name if name == "cldr" else str((folder / name).resolve()) for name in read.corpus),
            glossary=str((folder / read.glossary).resolve()) if read.glossary else "",
        ),
    )
    plans = {
        key: str((folder / plan).resolve())
        for key in ("image_plan", "text_plan")
        if (plan := getattr(recipe.quantize, key))
    }
    quantize = msgspec.structs.replace(recipe.quantize, **plans)
    return msgspec.structs.replace(recipe, data=data, teacher=teacher, quantize=quantize)


def _beside(name: str, folder: Path) -> str:
    """Return the path of a model's folder where the name is a relative path: it has a slash and no colon."""
    relative = "/" in name and ":" not in name and not name.startswith("~")
    return str((folder / name).resolve()) if relative else name


def toml_tree(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as tables that a TOML writer takes.

    TOML has no null, so what is None is absent; a table that would be empty is absent too, so that a new
    table of options changes no recipe that asks for none of them.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: plain(child) for key, child in value.items() if child is not None}
            return {key: child for key, child in kept.items() if child != {}}
        return list(value) if isinstance(value, tuple) else value

    tree: dict[str, Any] = plain(msgspec.to_builtins(recipe))
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise UserError(f"cannot read the override {override!r}; write it as section.key=value")
    *sections, key = name.strip().split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"{section!r} in {override!r} is a value, not a table; write section.key=value")
        tree = child
    try:
        tree[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        tree[key] = value.strip()  # a bare word is a string, as in a shell


def _blamed(text: str, overrides: Iterable[str]) -> str | None:
    """Return the first override with which the recipe is no longer valid; None if it never was."""
    tree = tomllib.loads(text)
    for override in (None, *overrides):
        if override is not None:
            _apply_override(tree, override)
        try:
            msgspec.convert(tree, Recipe)
        except msgspec.ValidationError:
            return None if override is None else f"--set {override}"
    return None


def _explained(error: msgspec.ValidationError, origin: str) -> UserError:
    message = str(error)
    if "contains unknown field" in message:
        field = message.split("`")[1]
        section = message.partition("$.")[2].rstrip("`") if "$." in message else ""
        node: Any = msgspec.to_builtins(Recipe())
        for part in filter(None, section.split(".")):
            node = node[part]
        where = f"{section}.{field}" if section else field
        return UserError(f"{origin}: {unknown_name('recipe key', where, _dotted(node, section))}")
    where = message.partition("$.")[2].rstrip("`") or "the recipe"
    reason = message.split(" - at")[0]
    return UserError(f"{origin}: {where}: {reason}; give {where} a value of that kind")


def _dotted(node: Mapping[str, Any], section: str) -> list[str]:
    return [f"{section}.{key}" if section else key for key in node]
