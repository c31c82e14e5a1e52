"""Icon sets in the Iconify JSON format, and how one icon becomes pixels.

The format: https://iconify.design/docs/types/iconify-json.html . A body is the inside of an ``<svg>``; an
icon's box is its own or the set's, at 16 by 16 if neither says; an alias may turn or mirror its parent.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError


class _Box(msgspec.Struct, frozen=True, kw_only=True):
    left: float | None = None
    top: float | None = None
    width: float | None = None
    height: float | None = None


class _Icon(_Box, frozen=True, kw_only=True):
    body: str
    hidden: Any = False


class _Alias(_Box, frozen=True, kw_only=True, rename="camel"):
    parent: str
    rotate: int = 0
    h_flip: bool = False
    v_flip: bool = False
    hidden: Any = False


class _Set(_Box, frozen=True, kw_only=True):
    prefix: str
    icons: dict[str, _Icon]
    aliases: dict[str, _Alias] = {}


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """One style.

    Attributes:
        name: Its prefix, such as ``noto``.
        icons: A whole SVG document by name, hidden ones left out, turned and mirrored aliases included.
        aliases: Other names of an icon that is drawn just the same, to the icon's name.
        codes: Code point sequences of an icon, without variation selectors.
    """

    name: str
    icons: Mapping[str, str]
    aliases: Mapping[str, str]
    codes: Mapping[str, frozenset[str]]


def icon_set_from_json(icons: bytes, chars: bytes) -> IconSet:
    """Read ``icons.json`` and ``chars.json`` of an Iconify package. Raises UserError if they are not that."""
    try:
        parsed = msgspec.json.decode(icons, type=_Set)
        code_names = msgspec.json.decode(chars, type=dict[str, str])
    except msgspec.DecodeError as error:
        raise UserError(f"not an Iconify icon set: {error}; fetch it again") from error
    documents = {
        name: _svg(icon.body, icon, parsed) for name, icon in parsed.icons.items() if not icon.hidden
    }
    aliases: dict[str, str] = {}
    for name, alias in parsed.aliases.items():
        parent = parsed.icons.get(alias.parent)
        if parent is None or alias.hidden:
            continue
        if alias.rotate or alias.h_flip or alias.v_flip:
            documents[name] = _svg(_turned(parent.body, parent, alias, parsed), parent, parsed)
        else:
            aliases[name] = alias.parent
    codes: dict[str, set[str]] = defaultdict(set)
    for code, name in code_names.items():
        codes[name].add(plain_code(code))
    return IconSet(
        name=parsed.prefix,
        icons=documents,
        aliases=aliases,
        codes={name: frozenset(found) for name, found in codes.items()},
    )


def plain_code(code: str) -> str:
    """Return a code point sequence without variation selectors: ``2764-fe0f`` is ``2764``."""
    return "-".join(part for part in code.lower().split("-") if part not in ("fe0e", "fe0f"))


def rgb_from_svg(svg: str, size: int) -> npt.NDArray[np.uint8]:
    """Render an SVG document on white. Returns uint8 [size, size, 3], RGB, deterministic."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)


def _extent(icon: _Box, defaults: _Box) -> tuple[float, float, float, float]:
    def of(own: float | None, default: float | None, otherwise: float) -> float:
        return own if own is not None else default if default is not None else otherwise

    return (
        of(icon.left, defaults.left, 0.0),
        of(icon.top, defaults.top, 0.0),
        of(icon.width, defaults.width, 16.0),
        of(icon.height, defaults.height, 16.0),
    )


def _svg(body: str, icon: _Box, defaults: _Box) -> str:
    """Wrap a body; a box that is not square is centred in one that is."""
    left, top, width, height = _extent(icon, defaults)
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side:g}" height="{side:g}">{body}</svg>'
    )


def _turned(body: str, icon: _Box, alias: _Alias, defaults: _Box) -> str:
    left, top, width, height = _extent(icon, defaults)
    x, y = left + width / 2, top + height / 2
    mirror = f"scale({-1 if alias.h_flip else 1} {-1 if alias.v_flip else 1})"
    turn = f"translate({x:g} {y:g}) rotate({90 * alias.rotate}) {mirror} translate({-x:g} {-y:g})"
    return f'<g transform="{turn}">{body}</g>'
