from __future__ import annotations

from pathlib import Path

import pytest

from edgeglm.core.artifact import Artifact


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, Artifact]:
    """Five tiny icon sets: one hides an icon, one renames by code point, one by alias."""
    from edgeglm.data.icons import KEYWORDS_ASSET
    from tests.data.icon_packages import NAMES, STYLES, body, package

    made = {}
    for style in STYLES:
        icons = {name: {"body": body(style, name)} for name in NAMES}
        codes = {f"1f{i:03x}": name for i, name in enumerate(NAMES)}
        aliases = {"canine": {"parent": "dog"}} if style == "noto" else {}
        if style == "fluent-emoji-flat":
            icons["doggy"] = icons.pop("dog")
            codes = {code: "doggy" if name == "dog" else name for code, name in codes.items()}
        if style == "emojione":
            icons["canine"], codes = icons.pop("dog"), {}
            del icons["sun"]
        if style == "openmoji":
            icons["star"]["hidden"] = True  # type: ignore[assignment]
        content = {"prefix": style, "icons": icons, "aliases": aliases, "width": 36, "height": 36}
        made[style] = package(tmp_path / style, style, {"icons.json": content, "chars.json": codes})
    words = {chr(0x1F000 + i): {"default": ["thing", f"word {i}", NAMES[i], "-"]} for i in range(len(NAMES))}
    made[KEYWORDS_ASSET] = package(
        tmp_path / "cldr",
        "cldr",
        {"annotations/en/annotations.json": {"annotations": {"annotations": words}}},
    )
    return made
