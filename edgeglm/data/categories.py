"""Which kind of thing an emoji shows: Unicode's groups and subgroups, from the package ``emoji.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from edgeglm.core.errors import UserError
from edgeglm.data.iconsets import plain_code

CATEGORIES_ASSET = "emoji-groups"
#: Category and subcategory of a code point sequence.
Kinds = Mapping[str, tuple[str, str]]


class _Emoji(msgspec.Struct, frozen=True):
    codes: str
    group: str
    subgroup: str


def kinds_from_emoji_json(data: bytes) -> Kinds:
    """Read ``emoji.json``: code point sequence (no variation selectors) to its group and subgroup."""
    try:
        parsed = msgspec.json.decode(data, type=list[_Emoji])
    except msgspec.DecodeError as error:
        raise UserError(f"not a list of emoji with their groups: {error}; fetch it again") from error
    return {plain_code(one.codes.replace(" ", "-")): (one.group, one.subgroup) for one in parsed}


def kind_of(codes: Iterable[str], kinds: Kinds) -> tuple[str, str]:
    """Return category and subcategory of a concept; two empty texts where none of its codes is listed."""
    return next((kinds[code] for code in sorted(codes) if code in kinds), ("", ""))
