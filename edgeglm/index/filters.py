"""Filters on metadata: ``{"kind": "png", "price": {">=": 3, "<": 5}}``, or in words ``kind=png``.

Every field must hold; a list means any of its values. A row that lacks a field fails every condition on it
but ``!=``. Numbers compare with numbers, texts with texts; ``true`` is no number.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.data.tokenization import is_unicode
from edgeglm.index.records import metadata_of

Mask = npt.NDArray[np.bool_]
_ORDERINGS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_MISSING = object()
_WORDS = re.compile(r"([^=!<>]+)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_PARTS = re.compile(r'(?:[^\s"]|"[^"]*")+')
_LONG = 100  # characters of it that a message repeats
_MOST = 64  # conditions of one filter: it may come from outside


class Columns:
    """The metadata of N rows by field."""

    def __init__(self, metadata: Iterable[msgspec.Raw]) -> None:
        self._rows = [metadata_of(raw) for raw in metadata]

    def mask(self, where: Mapping[str, Any]) -> Mask:
        """Return bool [N], true where the filter holds.

        Raises UserError for a field that no row has, an unknown operator or too many conditions.
        """
        held = np.ones(len(self._rows), dtype=np.bool_)
        conditions = [(name, *one) for name, wanted in where.items() for one in _conditions(name, wanted)]
        if len(conditions) > _MOST:
            raise UserError(f"a filter has {len(conditions)} conditions; give at most {_MOST}")
        for name, sign, value in conditions:
            held &= self._held(name, sign, value)
        return held

    def _held(self, name: str, sign: str, value: Any) -> Mask:
        column = [row.get(name, _MISSING) for row in self._rows]
        if column and all(found is _MISSING for found in column):
            fields = {field for row in self._rows for field in row}
            raise unknown_name("metadata field", name[:_LONG], fields)
        if sign in _ORDERINGS:
            holds = _ORDERINGS[sign]
            found = (_kind(cell) == _kind(value) is not None and holds(cell, value) for cell in column)
        else:
            values = value if isinstance(value, list) else [value]
            wanted = {(type(one) is bool, one) for one in values}
            equal = ((type(cell) is bool, cell) in wanted if _plain(cell) else False for cell in column)
            found = equal if sign == "=" else (not one for one in equal)
        return np.fromiter(found, np.bool_, len(column))


def where_from_words(words: Sequence[str]) -> dict[str, Any]:
    """Parse ``field=value``, ``field!=value`` and the four orderings; a repeated ``=`` means any of them.

    A value that is JSON (a number, true, a quoted text) is that; anything else is a text.
    Raises UserError for words without an operator, or that are no Unicode.
    """
    where: dict[str, dict[str, Any]] = {}
    for text in words:
        if not is_unicode(text):
            raise UserError("a filter is no Unicode; type it in a terminal that writes UTF-8")
        match = _WORDS.fullmatch(text)
        if match is None:
            raise UserError(f"cannot read the filter {_short(text)}; write it like field=value or field>=3")
        name, sign, value = match[1].strip(), match[2], _value(match[3].strip())
        signs = where.setdefault(name, {})
        if sign in ("=", "!="):
            signs.setdefault(sign, []).append(value)
        elif sign in signs:
            raise UserError(f"the filter says {_short(name)} {sign} twice; give it once")
        else:
            signs[sign] = value
    return dict(where)


def where_from_text(text: str) -> dict[str, Any]:
    """Parse the same from one line, ``kind=png name="a b"``: quoted spaces part nothing. Raises UserError."""
    if text.count('"') % 2:
        raise UserError("a quote in the filter is not closed; close it")
    return where_from_words(_PARTS.findall(text))


def _conditions(name: str, wanted: Any) -> list[tuple[str, Any]]:
    if not isinstance(wanted, Mapping):
        wanted = {"=": wanted}
    found = []
    for sign, value in wanted.items():
        if sign not in ("=", "!=", *_ORDERINGS):
            raise unknown_name("operator of a filter", str(sign)[:_LONG], ("=", "!=", *_ORDERINGS))
        many = isinstance(value, list) and sign in ("=", "!=")
        if not all(map(_plain, value if many else [value])):
            raise UserError(
                f"the filter on {_short(name)} compares with {_short(value)}; "
                "give a text, number or true/false"
            )
        if sign in _ORDERINGS and _kind(value) is None:
            raise UserError(
                f"the filter {_short(name)} {sign} {_short(value)} has no order; give a number or a text"
            )
        found.append((sign, value))
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else text[:_LONG] + "..."


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _value(text: str) -> Any:
    try:
        found = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError):
        return text
    return found if _plain(found) else text
