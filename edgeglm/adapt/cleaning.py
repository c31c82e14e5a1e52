"""Texts made fit to be read: markup, noise and repetitions go, and so does what tells who somebody is.

What is replaced becomes a word in angle brackets, ``<PHONE>``. The patterns know Chinese ids with their
check digit, Chinese and international telephone numbers, bank cards by Luhn's check, mail and network
addresses, and Chinese names where they stand beside a title or a label. Microsoft Presidio, where it is
installed, finds names by a model besides, and runs the same patterns as a recogniser of its own.
"""

from __future__ import annotations

import html
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
_TITLES = "先生|女士|小姐|老师|医生|经理|主任|教授|同学|师傅"
_LABELS = "姓名|联系人|收件人|申请人|患者|客户|户主"
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"
_MARKUP = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[A-Za-z][^<>]*>", re.DOTALL | re.IGNORECASE)
_LINK = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)
_REPEATED = re.compile(r"([^\w\s])\1{2,}")


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One kind of thing to replace: group 1 of the expression, unless ``proves`` says it is none."""

    name: str
    expression: re.Pattern[str]
    proves: Callable[[str], bool] = lambda _: True


def is_chinese_id(text: str) -> bool:
    """Say whether 18 characters are a resident's id: a possible date and the right check (GB 11643-1999)."""
    month, day = int(text[10:12]), int(text[12:14])
    total = sum(int(digit) * weight for digit, weight in zip(text[:17], _ID_WEIGHTS, strict=True))
    return 1 <= month <= 12 and 1 <= day <= 31 and _ID_CHECKS[total % 11] == text[17].upper()


def is_card(text: str) -> bool:
    """Say whether digits, spaces and hyphens are a card's number by Luhn's check."""
    digits = [int(letter) for letter in text if letter.isdigit()][::-1]
    doubled = [2 * digit - 9 * (digit > 4) if i % 2 else digit for i, digit in enumerate(digits)]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0


_SURNAME = rf"(?:{_DOUBLE_SURNAMES}|[{_SURNAMES}])"
#: Before a number that stands alone: no part of another, though a hyphen may lead from a word to it.
_APART = r"(?<![\d.])(?<!\d-)"
_AREA = r"(?:\(0\d{2,3}\)[ -]?|0\d{2,3}[ -])"
_LINE = r"(?:\d{7,8}|\d{3,4}[ -]\d{4})"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
#: In the order in which they are looked for: what is longer and surer first.
_SOURCES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("EMAIL", r"(?<![A-Za-z0-9._%+-])([A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+)", lambda _: True),
    ("ID", r"(?<![0-9A-Za-z])([1-9]\d{16}[0-9Xx])(?![0-9A-Za-z])", is_chinese_id),
    ("CARD", r"(?<![\d+-])(\d(?:[ -]?\d){12,18})(?![\d-])", is_card),
    ("PHONE", rf"{_APART}((?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{{4}}[ -]?\d{{4}})(?!\d)", lambda _: True),
    ("PHONE", rf"{_APART}({_AREA}{_LINE}(?:-\d{{1,6}})?)(?!\d)", lambda _: True),
    ("PHONE", r"(?<![\w.])(\+[1-9]\d{0,2}(?:[ .-]?\(?\d{2,4}\)?){2,4})(?!\d)", lambda _: True),
    ("PHONE", r"(?<![\d.-])(\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?!\d)", lambda _: True),
    ("ADDRESS", rf"(?<![\d.])((?:{_BYTE}\.){{3}}{_BYTE})(?![\d.])", lambda _: True),
    ("PASSPORT", r"(?<![0-9A-Za-z])([EGDSPH]\d{8})(?![0-9A-Za-z])", lambda _: True),
    ("NAME", rf"({_SURNAME}[\u4e00-\u9fff]{{0,2}}?)(?=(?:{_TITLES}))", lambda _: True),
    ("NAME", rf"(?:{_LABELS})[:\s]\s*({_SURNAME}[\u4e00-\u9fff]{{1,2}})", lambda _: True),
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

    A sentence goes if it has fewer than two letters, if it came before, or if ``forbidden`` says so.
    """
    seen: set[str] = set()
    for document in documents:
        kept = []
        for raw in document:
            sentence = replace(tidied(raw), counts)
            if sum(letter.isalpha() for letter in sentence) < 2:
                counts["too short"] += 1
            elif sentence.casefold() in seen:
                counts["repeated"] += 1
            elif forbidden(sentence):
                counts["asked for by an evaluation"] += 1
            else:
                seen.add(sentence.casefold())
                kept.append(sentence)
        if kept:
            yield tuple(kept)
