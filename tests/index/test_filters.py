from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.index.filters import Columns, where_from_text, where_from_words

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0]), st.text("ab", max_size=2)
)
ROWS = st.lists(st.dictionaries(st.sampled_from("xyz"), VALUES), max_size=8)
SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def columns(rows: list[dict[str, Any]]) -> Columns:
    return Columns(msgspec.Raw(msgspec.msgpack.encode(row)) for row in rows)


def number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@given(rows=ROWS, value=VALUES, sign=st.sampled_from(["=", "!=", *SIGNS]))
def test_a_filter_takes_the_rows_that_it_says(rows, value, sign):
    if not any("x" in row for row in rows):
        return

    def equal(cell: object) -> bool:
        return isinstance(cell, bool) == isinstance(value, bool) and cell == value

    def holds(row: dict[str, Any]) -> bool:
        if sign == "=":
            return "x" in row and equal(row["x"])
        if sign == "!=":
            return "x" not in row or not equal(row["x"])
        cell = row.get("x")
        same = (number(cell) and number(value)) or (isinstance(cell, str) and isinstance(value, str))
        return same and SIGNS[sign](cell, value)

    if sign in SIGNS and not (number(value) or isinstance(value, str)):
        with pytest.raises(UserError, match="no order"):
            columns(rows).mask({"x": {sign: value}})
        return
    assert columns(rows).mask({"x": {sign: value}}).tolist() == [holds(row) for row in rows]


def test_words_of_another_encoding_are_refused_and_no_fault_of_the_index():
    with pytest.raises(UserError, match="no Unicode; type it in a terminal that writes UTF-8"):
        where_from_words(["kind=caf\udce9"])


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_words_are_a_filter_or_a_refusal(words):
    try:
        where_from_words(words)
        said = ""
    except UserError as error:
        said = str(error)
    assert not said or "write it like" in said or "give it once" in said


def test_words_become_the_filter_they_say():
    words = ["kind=png", "kind=jpg", "price>=3", "price<5.5", "sold!=true", "size=10", "name=a=b"]
    assert where_from_words(words) == {
        "kind": {"=": ["png", "jpg"]},
        "price": {">=": 3, "<": 5.5},
        "sold": {"!=": [True]},
        "size": {"=": [10]},
        "name": {"=": ["a=b"]},
    }


def test_a_line_of_words_is_parted_at_spaces_outside_of_quotes():
    assert where_from_text('kind=png  name="a b" price<20 note=x" y"') == {
        "kind": {"=": ["png"]},
        "name": {"=": ["a b"]},
        "price": {"<": 20},
        "note": {"=": ['x" y"']},
    }
    assert where_from_text("  ") == {}
    for wrong, why in (('name="a b', "not closed"), ("kind", "write it like"), ("a<1 a<2", "give it once")):
        with pytest.raises(UserError, match=why):
            where_from_text(wrong)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"kin": "png"}, "unknown metadata field 'kin'.*did you mean 'kind'"),
        ({"kind": {"~": "png"}}, "unknown operator"),
        ({"kind": {"=": {"a": 1}}}, "give a text, number"),
        ({"kind": [["png"]]}, "give a text, number"),
        ({str(i): 1 for i in range(100)}, "at most 64"),
    ],
)
def test_a_filter_from_outside_that_means_nothing_is_refused(where, why):
    with pytest.raises(UserError, match=why):
        columns([{"kind": "png", "list": [1]}]).mask(where)


@pytest.mark.parametrize("where", ["=" * 9000, "a" * 9000, "{0}<1 {0}<2".format("b" * 9000)])
def test_a_refusal_does_not_repeat_a_long_filter(where: str):
    with pytest.raises(UserError) as refused:
        where_from_text(where)
    assert len(str(refused.value)) < 300


def test_metadata_that_is_no_plain_value_is_never_equal():
    rows = columns([{"x": [1]}, {"x": {"a": 1}}, {"x": 1}])
    assert rows.mask({"x": 1}).tolist() == [False, False, True]
