"""What a text tower reads before it is aligned: corpora from files, the names of emoji, and a glossary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeglm.adapt.cleaning import TITLES, tidied
from edgeglm.assets import asset_member, asset_named
from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError
from edgeglm.core.teacher_config import PretrainingConfig
from edgeglm.data.concepts import text_of
from edgeglm.data.pairs import PairSet
from edgeglm.data.tracks import folded
from edgeglm.data.unseen_names import forms_of, words_of

CLDR = "cldr"
CLDR_ASSET = "cldr-annotations"
#: No sentence ends behind a title or an initial: a name that is cut off from it is not known for one.
_GOES_ON = "".join(rf"(?<!\b{word}\.)" for word in (*TITLES, "[A-Z]"))
_SENTENCE = re.compile(rf"(?<=[.!?]){_GOES_ON}\s+|(?<=[\u3002\uff01\uff1f])")
#: Letters of scripts that write words without spaces, Chinese and Japanese; and all other word signs.
_SIGNS = r"\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_UNPARTED, _PARTED = re.compile(f"[{_SIGNS}]"), rf"[^\W{_SIGNS}]"

Document = Sequence[str]


class _Line(msgspec.Struct):
    text: str


class _Entry(msgspec.Struct):
    default: tuple[str, ...] = ()
    tts: tuple[str, ...] = ()


class _Annotations(msgspec.Struct):
    annotations: dict[str, _Entry]


class _Cldr(msgspec.Struct):
    annotations: _Annotations


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where a term stands in a text: characters from ``start`` up to ``end``."""

    term: int
    start: int
    end: int


class Glossary:
    """The terms of a domain, each with its spellings (the first is the term itself), and where they stand."""

    def __init__(self, terms: Sequence[Sequence[str]]) -> None:
        self.terms = tuple(tuple(spellings) for spellings in terms)
        place: dict[str, int] = {}
        for index, spellings in enumerate(self.terms):
            for spelling in spellings:
                place.setdefault(spelling, index)
        self.place: Mapping[str, int] = place
        # Longest first, so that "red apple" is not read as "apple".
        ordered = sorted(filter(None, place), key=lambda spelling: (-len(spelling), spelling))
        self.expression = re.compile("|".join(map(_bordered, ordered)) or r"(?!)", re.IGNORECASE)

    def spans(self, text: str) -> list[Span]:
        """Return the terms that a text names, from left to right, none within another."""
        letters = [(part, i) for i, letter in enumerate(text) for part in letter.casefold()]
        at = [i for _, i in letters]  # a letter may fold to several, as the German sharp s does
        return [
            Span(term=self.place[folded(match[0])], start=at[match.start()], end=at[match.end() - 1] + 1)
            for match in self.expression.finditer("".join(part for part, _ in letters))
            if folded(match[0]) in self.place
        ]


def _bordered(spelling: str) -> str:
    """Return what matches a spelling as a word of its own; a side that is Chinese needs no border there.

    Nor is a Chinese sign beside a word of another script a part of it.
    """
    one = re.escape(spelling).replace(r"\ ", r"[\s-]+")
    before = "" if _UNPARTED.match(spelling[0]) else rf"(?<!{_PARTED})"
    after = "" if _UNPARTED.match(spelling[-1]) else rf"(?!{_PARTED})"
    return f"{before}{one}{after}"


def glossary_from_file(path: Path) -> Glossary:
    """Read a glossary: UTF-8, a term a line, other spellings after tabs, ``#`` before a remark."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the glossary {path}: {error}; give a UTF-8 file, a term a line"
        ) from error
    rows = [[folded(cell) for cell in line.split("\t")] for line in lines if not line.startswith("#")]
    terms = [tuple(dict.fromkeys(filter(None, row))) for row in rows if any(row)]
    if len(terms) < 2:
        raise UserError(f"the glossary {path} has {len(terms)} terms; give two or more, a term a line")
    return Glossary(terms)


def glossary_from_pairs(pairs: PairSet) -> Glossary:
    """Return the captions that train as terms: the captions of a concept are spellings of one."""
    spellings: dict[str, dict[str, None]] = {}
    for i in pairs.by_role("labelled").tolist():
        row = pairs.rows[i]
        spellings.setdefault(row.concept, {}).update(dict.fromkeys(map(folded, row.captions)))
    return Glossary([tuple(own) for _, own in sorted(spellings.items())])


def corpus_artifacts(config: PretrainingConfig) -> dict[str, Artifact]:
    """Hash the files of a corpus and the glossary where they lie: ``corpus-0``, ..., ``glossary``."""
    files = {f"corpus-{i}": name for i, name in enumerate(config.corpus) if name != CLDR}
    if config.glossary:
        files["glossary"] = config.glossary
    found = {}
    for name, file in files.items():
        path = Path(file)
        if not path.is_file():
            raise UserError(f"no file at {path} for teacher.pretraining; give the path of a text file")
        found[name] = Artifact(
            kind="text", path=path.parent, files={path.name: sha256_file(path)}, provenance={}
        )
    return found


def documents_of(
    inputs: Mapping[str, Artifact], config: PretrainingConfig, languages: Sequence[str] = ("en",)
) -> Iterator[Document]:
    """Yield the documents of a corpus in the order of the recipe, as they are written; CLDR's by language."""
    for i, name in enumerate(config.corpus):
        if name == CLDR:
            for language in languages:
                member = asset_named(CLDR_ASSET).members[language]
                yield from documents_from_cldr(asset_member(inputs[CLDR_ASSET], member))
        else:
            artifact = inputs[f"corpus-{i}"]
            yield from documents_from_file(artifact.path / next(iter(artifact.files)))


def languages_of(pairs: PairSet) -> tuple[str, ...]:
    """Return the languages in which the pairs are asked for, in order; English where they say none."""
    return tuple(dict.fromkeys(track.language for track in pairs.tracks if track.language)) or ("en",)


def documents_from_file(path: Path) -> Iterator[Document]:
    """Yield the documents of a text file, or of the lines of a ``.jsonl``. Raises UserError."""
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".jsonl":
            lines = msgspec.json.Decoder(_Line).decode_lines(text)
            yield from (_sentences(line.text) for line in lines)
            return
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise UserError(f"cannot read the corpus {path}: {error}; give UTF-8, a sentence a line") from error
    for block in re.split(r"\n\s*\n", text):
        yield [sentence for line in block.splitlines() for sentence in _sentences(line)]


def documents_from_cldr(data: bytes) -> Iterator[Document]:
    """Yield a document for each emoji: its name, and what else it is called."""
    try:
        parsed = msgspec.json.decode(data, type=_Cldr)
    except msgspec.DecodeError as error:
        raise UserError(f"not a CLDR annotations file: {error}; fetch it again") from error
    for entry in parsed.annotations.annotations.values():
        if entry.tts:
            yield [entry.tts[0], ", ".join(entry.default)]


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in _SENTENCE.split(text) if part and part.strip()]


def _key(text: str) -> str:
    """Return what a text is compared as: its words as one, without markup, signs, accents and case."""
    plain = tidied(text)
    return "".join(words_of(plain)) or folded(plain)


def evaluated_texts(pairs: PairSet) -> Callable[[str], bool]:
    """Return what tells a tidied sentence that says no more than some track asks, or a held caption does.

    A corpus is read by sentences, so that each sentence of such a text counts as the whole of it does.
    """
    queries = [query.text for track in pairs.tracks for query in track.queries]
    held = [text for row in pairs.rows if row.role == "held" for text in row.captions]
    trained, asked = _keys(pairs.training_texts()), _keys([*queries, *held])
    return _meets(asked - trained, trained)


def _keys(texts: Iterable[str]) -> set[str]:
    """Return the keys of texts and of their sentences; none of what says nothing."""
    return {_key(part) for text in texts for part in (text, *_sentences(text))} - {""}


def without_unseen(documents: Iterator[Document], pairs: PairSet, counts: Counter[str]) -> Iterator[Document]:
    """Leave out whole documents that open with the name of a concept of which nothing may be learned.

    A concept has its own name, which is English for icons, besides those in the languages of the pairs.
    """
    known = {row.concept for row in pairs.rows if row.role == "labelled"}
    unknown = [row for row in pairs.rows if row.concept not in known]
    names = {_key(text) for row in unknown for text in (text_of(row.concept), *row.captions)}
    is_name = _meets(names, set())
    for document in documents:
        if document and is_name(document[0]):
            counts["about an unseen concept"] += 1
        else:
            yield document


def _meets(keys: set[str], allowed: set[str]) -> Callable[[str], bool]:
    """Return what tells a text that is one of ``keys``, in singular or plural, and none that is allowed."""
    forms = frozenset[str]().union(*map(forms_of, keys))

    def meets(text: str) -> bool:
        key = _key(text)
        return key not in allowed and not forms.isdisjoint(forms_of(key))

    return meets
