"""Texts made fit to be read: markup, noise and repetitions go, and so does what tells who somebody is.

What is replaced becomes a word in angle brackets, ``<PHONE>``. The patterns know Chinese ids with their
check digit and the older ones of 15 digits, Chinese and international telephone numbers, bank cards by
Luhn's check, mail addresses in any script, network addresses, and names where they stand beside a title or a
label. Microsoft Presidio, where it is installed, finds names by a model besides, and runs the same patterns
as a recogniser of its own.
"""

from __future__ import annotations

import html
import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from edgeglm.core.errors import UserError

_SURNAMES = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗郑梁谢宋唐许韩冯邓曹彭曾肖田董袁潘于蒋蔡余杜叶程苏魏吕丁任沈姚卢"
    "姜崔钟谭陆汪范金石廖贾夏韦付方白邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵万钱严覃武戴莫孔向汤"
)
_DOUBLE_SURNAMES = "欧阳|上官|端木|司马|东方|南宫|夏侯|诸葛|尉迟|皇甫|公孙|慕容|令狐|长孙|宇文|司徒|司空"
#: Words that begin like a surname and stand before a title.
_NO_NAMES = "高级|高等|高中|金牌|王牌|任课|史学|陶艺|谢谢|马上|方便|万能|白衣|文学|汉语|石油|武术|孔子"
_TITLES = "先生|女士|小姐|老师|医生|经理|主任|教授|同学|师傅"
#: English ones stand before a name; where one is followed by a full stop, no sentence ends.
TITLES = ("Mr", "Mrs", "Ms", "Dr", "Prof")
_LABELS = "姓名|联系人|收件人|申请人|患者|客户|户主"
#: What may follow a name that a label without a colon announces, besides the end of the word.
_AFTER_NAMES = "电话|手机|性别|年龄|身份证|地址|住址|邮箱|先生|女士|小姐"
_ENGLISH_LABELS = "[Cc]ontact(?: person)?|[Pp]atient|[Cc]ustomer|[Aa]pplicant|[Rr]ecipient|Attn"
#: A name that opens a field or says whose it is; that of a product or of a file is none.
_ENGLISH_NAME = (
    r"(?:^|(?<=[,;|.] )|(?<=[,;|.])|\b(?:[Ff]ull|[Ff]irst|[Ll]ast|[Pp]atient|[Cc]ustomer|[Cc]ontact) )"
)
_ENGLISH_NAME += r"(?:[Nn]ame|NAME)"
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"
_PROVINCES = {*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66)}
_MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[A-Za-z][^<>]*>", re.DOTALL | re.IGNORECASE)
_LINK = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)
_REPEATED = re.compile(r"([^\w\s])\1{2,}")


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One kind of thing to replace: group 1 of the expression, unless ``proves`` says it is none."""

    name: str
    expression: re.Pattern[str]
    proves: Callable[[str], bool]


def _always(_: str) -> bool:
    return True


def is_chinese_id(text: str) -> bool:
    """Say whether 18 signs are a resident's id: a possible date and the right check (GB 11643-1999)."""
    text = "".join(letter for letter in text if letter.isalnum())
    month, day = int(text[10:12]), int(text[12:14])
    total = sum(int(digit) * weight for digit, weight in zip(text[:17], _ID_WEIGHTS, strict=True))
    return 1 <= month <= 12 and 1 <= day <= 31 and _ID_CHECKS[total % 11] == text[17].upper()


def is_old_chinese_id(text: str) -> bool:
    """Say whether 15 digits are a resident's id of before 1999: a province and a day of the 20th century."""
    month, day = int(text[8:10]), int(text[10:12])
    return int(text[:2]) in _PROVINCES and 1 <= month <= 12 and 1 <= day <= 31


def is_card(text: str) -> bool:
    """Say whether digits, spaces and hyphens are a card's number: its length, first digit and Luhn's check.

    13 digits are an article's number, and no card has had so few for decades.
    """
    digits = [int(letter) for letter in text if letter.isdigit()]
    if not 14 <= len(digits) <= 19 or (digits[0] != 3 if len(digits) < 16 else digits[0] < 2):
        return False
    doubled = [2 * digit - 9 * (digit > 4) if i % 2 else digit for i, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def is_long_number(text: str) -> bool:
    """Say whether a number with a plus sign has as many digits as a telephone's (ITU-T E.164)."""
    return 8 <= sum(letter.isdigit() for letter in text) <= 15


def is_ipv6(text: str) -> bool:
    """Say whether groups with colons are an address of a host: ``::1``, ``1::2`` and ``a::b`` are none."""
    try:
        found = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    if text.count(":") == 2 and not any(letter.isdigit() for letter in text):
        return False  # two words, as bead::cafe
    return int(found) >> 112 >= 0x100 or found.ipv4_mapped is not None or text.count(":") == 7


_SURNAME = rf"(?:{_DOUBLE_SURNAMES}|[{_SURNAMES}])"
_HAN = r"\u3400-\u9fff"
#: A letter or digit of a script that parts its words; Chinese ones would run into the text around.
_LETTER = rf"[^\W_{_HAN}]"
_CHINESE_ENDS = "中国|中國|公司|网络|網絡|网址|在线|中文网|商城|集团|香港|台湾|台灣|新加坡|我爱你|政务|公益"
_LABEL = rf"(?:(?:{_LETTER}|-)+|[{_HAN}]+(?:{_LETTER}|-)*)"
_MAIL = (
    rf"(?:(?<!{_LETTER})(?<![._%+-])(?:{_LETTER}|[._%+-])+|[{_HAN}]{{1,4}})"
    rf"@(?:{_LABEL}\.)+(?!\d+\b)(?:{_CHINESE_ENDS}|(?:{_LETTER}|-)+)"
)
#: Before a number that stands alone: no part of another, though a hyphen may lead from a word to it.
_APART = r"(?<![\d.])(?<!\d-)"
_GAP = r"(?: ?[.\u00b7\u2010-\u2015-] ?| )?"
_AREA = r"(?:\(0\d{2,3}\)[ -]?|0\d{2,3}[ .\u2010-\u2015-])"
_LINE = r"(?:\d{7,8}|\d{3,4}[ .-]\d{4})"
_GROUPED = r"\d{4}([ -])\d{4}\2\d{4}\2\d{1,4}(?:\2\d{1,3})?|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{6}[ -]\d{10,13}"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_IPV6 = rf"(?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:{_IPV4}|[0-9A-Fa-f]{{0,4}})"
_FIRST_WORD = r"[A-Z\u00c0-\u00de][\w'\u2019-]*"
#: With initials before it.
_WHOLE_FIRST = rf"(?:[A-Z]\. ?){{0,3}}{_FIRST_WORD}"
_NEXT_WORD = rf"(?: (?:[A-Z]\.|{_FIRST_WORD}|van|von|de|da|bin|al))"
#: After "Name" these are a thing's words, and after a title a brand's or a figure's.
_NO_THING = r"(?!(?:Tags?|Plate|Badge|Brand|Card|Board|Sign|Label|Sticker|Necklace|Bracelet|Day|Of|The)\b)"
_NO_FIGURE = r"(?!(?:Claus|Pepper|Martens|Scholl|Potato)\b)"
_END = rf"(?=[^{_HAN}]|$|{_AFTER_NAMES})"
#: In the order in which they are looked for: what is longer and surer first.
_SOURCES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("EMAIL", rf"({_MAIL})", _always),
    ("ID", r"(?<![0-9A-Za-z])([1-9]\d{5}[ -]?\d{8}[ -]?\d{3}[0-9Xx])(?![0-9A-Za-z])", is_chinese_id),
    ("ID", r"(?<![0-9A-Za-z.,-])([1-9]\d{14})(?![0-9A-Za-z-])(?![.,]\d)", is_old_chinese_id),
    ("CARD", rf"(?<![0-9A-Za-z+-])(\d{{14,19}}|{_GROUPED})(?![0-9A-Za-z-])", is_card),
    ("PHONE", rf"{_APART}((?:(?:\+|00)?86{_GAP})?1[3-9]\d{_GAP}\d{{4}}{_GAP}\d{{4}})(?!\d)", _always),
    ("PHONE", rf"{_APART}({_AREA}{_LINE}(?:-\d{{1,6}})?)(?!\d)", _always),
    ("PHONE", r"(?<![\w.])(\+[1-9]\d{0,2}(?:[ .-]?\(?\d{2,4}\)?){2,4})(?!\d)", is_long_number),
    ("PHONE", r"(?<![\d.-])(\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?!\d)", _always),
    ("ADDRESS", rf"(?<![0-9A-Za-z:.])({_IPV6})(?![0-9A-Za-z]|:[0-9A-Za-z:])", is_ipv6),
    ("ADDRESS", rf"(?<![\d.vV])({_IPV4})(?!\d|\.\d)", _always),
    ("PASSPORT", r"(?<![0-9A-Za-z])([EGDSPH]\d{8})(?![0-9A-Za-z])", _always),
    ("NAME", rf"((?!{_NO_NAMES}){_SURNAME}[{_HAN}]{{0,2}}?)(?=(?:{_TITLES}))", _always),
    ("NAME", rf"(?:{_LABELS})\s?:\s*({_SURNAME}(?:[{_HAN}]{{1,2}}?{_END}|[{_HAN}]{{1,2}}))", _always),
    ("NAME", rf"(?:(?:{_LABELS})\s+|姓名[为是叫]?)({_SURNAME}[{_HAN}]{{1,2}}?){_END}", _always),
    (
        "NAME",
        rf"(?:\b(?:{_ENGLISH_LABELS})|{_ENGLISH_NAME}) ?: ?({_WHOLE_FIRST}{_NEXT_WORD}{{0,3}})",
        _always,
    ),
    ("NAME", rf"(?:{_ENGLISH_NAME}|\b[Mm]y name is) ({_NO_THING}{_WHOLE_FIRST}{_NEXT_WORD}{{1,3}})", _always),
    ("NAME", rf"\b(?:{'|'.join(TITLES)})\b\.? ({_NO_FIGURE}{_WHOLE_FIRST}{_NEXT_WORD}{{0,2}})", _always),
)
PATTERNS = tuple(
    Pattern(name=name, expression=re.compile(source), proves=proves) for name, source, proves in _SOURCES
)


def by_patterns(text: str, counts: Counter[str]) -> str:
    """Return the text with what the patterns find replaced, and count each kind."""
    for pattern in PATTERNS:

        def replaced(match: re.Match[str], pattern: Pattern = pattern) -> str:
            if not pattern.proves(match[1]):
                return match[0]
            counts[pattern.name] += 1
            start, end = match.start(1) - match.start(), match.end(1) - match.start()
            return f"{match[0][:start]}<{pattern.name}>{match[0][end:]}"

        text = pattern.expression.sub(replaced, text)
    return text


class PresidioNames:
    """Names of people found by Microsoft Presidio in English texts; our patterns are a recogniser in it."""

    def __init__(self, model: str) -> None:
        try:
            from presidio_analyzer import (
                AnalyzerEngine,
                EntityRecognizer,
                RecognizerRegistry,
                RecognizerResult,
            )
            from presidio_analyzer.nlp_engine import NlpEngineProvider
            from presidio_analyzer.predefined_recognizers import SpacyRecognizer
        except ImportError as error:
            raise UserError(
                'teacher.pretraining.deidentify = "presidio" needs Presidio; '
                "pip install 'edgeglm[privacy]', or set it to \"patterns\""
            ) from error
        _require_model(model)

        class Ours(EntityRecognizer):  # type: ignore[misc] # Presidio may be absent
            def load(self) -> None:
                """Nothing to load."""

            def analyze(self, text: str, entities: Any, nlp_artifacts: Any = None) -> list[Any]:
                return [
                    RecognizerResult(pattern.name, match.start(1), match.end(1), 1.0)
                    for pattern in PATTERNS
                    for match in pattern.expression.finditer(text)
                    if pattern.proves(match[1])
                ]

        settings = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": model}]}
        registry = RecognizerRegistry(supported_languages=["en"])
        registry.add_recognizer(SpacyRecognizer(supported_language="en", supported_entities=["PERSON"]))
        names = sorted({pattern.name for pattern in PATTERNS})
        registry.add_recognizer(Ours(supported_entities=names, supported_language="en"))
        engine = NlpEngineProvider(nlp_configuration=settings).create_engine()
        self.analyzer: Any = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])

    def replaced(self, text: str, counts: Counter[str]) -> str:
        """Return the text with names, and what the patterns find, replaced, and count each kind."""
        found = self.analyzer.analyze(text=text, language="en")
        taken: list[tuple[int, int, str]] = []
        for one in sorted(found, key=lambda result: (-result.score, -(result.end - result.start))):
            if all(one.end <= start or one.start >= end for start, end, _ in taken):
                name = "NAME" if one.entity_type == "PERSON" else one.entity_type
                taken.append((one.start, one.end, name))
        for start, end, name in sorted(taken, reverse=True):
            counts[name] += 1
            text = f"{text[:start]}<{name}>{text[end:]}"
        return text


def _require_model(model: str) -> None:
    import importlib.util

    if importlib.util.find_spec(model) is None:
        raise UserError(
            f"teacher.pretraining.name_model = {model!r} is no installed model of spaCy; install it, "
            'or set teacher.pretraining.deidentify = "patterns"'
        )


def replacer(way: str, model: str) -> Callable[[str, Counter[str]], str]:
    """Return what takes identities out of a text, for a value of ``teacher.pretraining.deidentify``."""
    if way == "off":
        return lambda text, _: text
    if way == "presidio":
        return PresidioNames(model).replaced
    return by_patterns


def tidied(text: str) -> str:
    """Return the text without markup, links, control characters and runs of the same sign; NFKC, one line."""
    text = html.unescape(_MARKUP.sub(" ", text))
    text = unicodedata.normalize("NFKC", _LINK.sub(" ", text))
    text = "".join(letter if unicodedata.category(letter)[0] != "C" else " " for letter in text)
    return " ".join(_REPEATED.sub(r"\1", text).split())


def cleaned(
    documents: Iterable[Iterable[str]],
    replace: Callable[[str, Counter[str]], str],
    counts: Counter[str],
    *,
    forbidden: Callable[[str], bool] = lambda _: False,
) -> Iterator[tuple[str, ...]]:
    """Yield the documents whose sentences are worth reading; what is left out or replaced is counted.

    A sentence goes if it has fewer than two letters, if it came before, or if ``forbidden`` says so of it as
    it was before names and numbers were replaced.
    """
    seen: set[str] = set()
    for document in documents:
        kept = []
        for raw in document:
            plain = tidied(raw)
            sentence = replace(plain, counts)
            if sum(letter.isalpha() for letter in sentence) < 2:
                counts["too short"] += 1
            elif sentence.casefold() in seen:
                counts["repeated"] += 1
            elif forbidden(plain):
                counts["asked for by an evaluation"] += 1
            else:
                seen.add(sentence.casefold())
                kept.append(sentence)
        if kept:
            yield tuple(kept)
