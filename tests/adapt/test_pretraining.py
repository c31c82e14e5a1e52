"""If these fail, a text tower reads nothing, reads what it is judged on, or is another after a kill."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("transformers", reason="the host half is not installed")

import msgspec  # noqa: E402
import numpy as np  # noqa: E402

from edgeglm.adapt.cleaning import by_patterns, cleaned  # noqa: E402
from edgeglm.adapt.corpora import (  # noqa: E402
    Glossary,
    documents_from_cldr,
    documents_from_file,
    documents_of,
    evaluated_texts,
    glossary_from_file,
    glossary_from_pairs,
    without_unseen,
)
from edgeglm.adapt.pretraining import Reader, pretrained  # noqa: E402
from edgeglm.adapt.pretraining_stage import PretrainingStage  # noqa: E402
from edgeglm.adapt.text_teacher import TextTeacher, load_text_teacher  # noqa: E402
from edgeglm.core.artifact import Artifact  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.teacher_config import OptimisationConfig, PretrainingConfig, TeacherConfig  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402
from tests.synthetic import COLOURS, SHAPES, write_synthetic_pairs  # noqa: E402
from tests.tiny_towers import write_bert, write_clip  # noqa: E402

CONFIG = PretrainingConfig(epochs=12, learning_rate=2e-3, batch_size=16, max_length=16)
#: The second sentence hangs on the first, so order and words can be learned.
DOCUMENTS = [
    (f"a {colour} {shape}", f"river {shape} stone {colour}") for colour in COLOURS for shape in SHAPES
]
GLOSSARY = Glossary([(shape,) for shape in SHAPES])


def loaded(folder: Path, scratch: Path) -> TextTeacher:
    source = Artifact(kind="asset", path=folder, files={"config.json": "", "tokenizer.json": ""})
    return load_text_teacher(str(folder), source, scratch, max_length=16)


@pytest.fixture
def teacher(tmp_path: Path) -> TextTeacher:
    return loaded(write_bert(tmp_path / "bert"), tmp_path / "scratch")


def after(teacher: TextTeacher, **options: Any) -> dict[str, Any]:
    config = msgspec.structs.replace(CONFIG, **options)
    with seeded(0, threads=1):
        return pretrained(teacher, DOCUMENTS, GLOSSARY, config, seed=0, progress=QuietProgress())


@pytest.mark.parametrize(
    ("objective", "options", "least"),
    [
        ("mlm", {}, 0.25),
        ("order", {"mlm_weight": 0.0, "order_weight": 1.0}, 0.9),
        ("term", {"mlm_weight": 0.0, "term_weight": 1.0, "epochs": 25}, 0.25),
    ],
)
def test_each_objective_is_learned_and_holds_for_what_was_not_read(
    objective: str, options: dict[str, Any], least: float, teacher: TextTeacher
) -> None:
    plain = teacher.all_features(["a red circle"])
    told = after(teacher, **options)
    assert told["held_rows"] == 4
    assert told["after"][objective]["loss"] < 0.9 * told["before"][objective]["loss"]
    assert told["after"][objective]["accuracy"] >= least
    assert told["curve"][-1] < told["curve"][0]
    assert float((teacher.all_features(["a red circle"]) - plain).abs().max()) > 1e-3
    assert not any(parameter.requires_grad for parameter in teacher.tower.parameters())


@pytest.mark.parametrize(
    "option",
    [{"schedule": "exponential"}, {"adaptive_clip": 0.01}, {"accumulate": 2}, {"precision": "bfloat16"}],
)
def test_a_reading_steps_as_the_recipe_says(option: dict[str, Any], tmp_path: Path) -> None:
    stepping = msgspec.convert(option, OptimisationConfig)
    curves = []
    for place, wanted in enumerate((None, stepping, stepping)):
        teacher = loaded(write_bert(tmp_path / f"bert-{place}"), tmp_path / f"scratch-{place}")
        few = msgspec.structs.replace(CONFIG, epochs=2, term_weight=1.0, anchor_weight=1.0)
        read: Any = {"seed": 0, "progress": QuietProgress(), "stepping": wanted}
        with seeded(0, threads=1):
            curves.append(pretrained(teacher, DOCUMENTS, GLOSSARY, few, **read)["curve"])
    assert curves[0] != curves[1] == curves[2]
    keys = []
    for optimisation in (OptimisationConfig(), OptimisationConfig(checkpoint_epochs=3), stepping):
        config = TeacherConfig(optimisation=optimisation)
        keys.append(PretrainingStage(config, seed=0, max_length=16).key({}))
    assert keys[0] == keys[1] != keys[2]


def test_an_anchor_keeps_features_near_what_they_were(teacher: TextTeacher, tmp_path: Path) -> None:
    texts = [document[0] for document in DOCUMENTS]
    plain = teacher.all_features(texts)
    free, held = (loaded(write_bert(tmp_path / name), tmp_path / f"{name}-s") for name in ("free", "held"))
    after(free)
    after(held, anchor_weight=30.0)
    near = [torch.cosine_similarity(plain, one.all_features(texts)).mean() for one in (free, held)]
    assert near[1] > near[0]


def test_terms_are_masked_whole_and_the_right_places_are_told(teacher: TextTeacher) -> None:
    glossary = Glossary([("red circle",), ("stone",)])
    reader = Reader(
        teacher, [("a red circle", "river stone")] * 3, glossary,
        msgspec.structs.replace(CONFIG, term_weight=1.0, mask_fraction=1e-9), seed=0,
    )  # fmt: skip
    batch = reader.reading([("a red circle", "river stone")] * 40, np.random.default_rng(0))
    mask, words = teacher.tokenizer.mask_id, dict(enumerate(teacher.tokenizer.vocabulary()))
    assert set(batch.term_S.tolist()) == {0, 1}
    for row, mean_L, term in zip(batch.row_S.tolist(), batch.mean_SL, batch.term_S.tolist(), strict=True):
        columns = torch.nonzero(mean_L)[:, 0].tolist()
        assert len(columns) == (2 if term == 0 else 1)
        assert all(int(batch.ids_BL[row, column]) == mask for column in columns)
    told = [words[word] for word in batch.word_M.tolist()]
    assert set(told) == {"red", "circle", "stone"}
    assert told.count("red") == told.count("circle"), "never a part of a term"


def test_swapped_sentences_are_swapped_and_known(teacher: TextTeacher) -> None:
    documents = [*DOCUMENTS, ("river", "stone"), ("cloud",)]
    reader = Reader(teacher, documents, GLOSSARY, msgspec.structs.replace(CONFIG, order_weight=1.0), seed=0)
    batch = reader.reading([("river", "stone")] * 30 + [("cloud",)], np.random.default_rng(0))
    assert batch.swapped_B[-1] == -1
    assert 5 < int(batch.swapped_B[:30].sum()) < 25
    again = reader.reading([("river", "stone")] * 30 + [("cloud",)], np.random.default_rng(0))
    assert torch.equal(batch.ids_BL, again.ids_BL)


def test_nothing_is_told_of_an_order_that_nobody_asks_for(teacher: TextTeacher) -> None:
    reader = Reader(teacher, DOCUMENTS, GLOSSARY, CONFIG, seed=0)
    assert set(reader.judged()) == {"mlm"}


def test_a_tower_that_cannot_be_masked_says_so(tmp_path: Path) -> None:
    clip = loaded(write_clip(tmp_path / "clip"), tmp_path / "s")
    with pytest.raises(UserError, match=r"reads with causal masks.*leave teacher\.pretraining out"):
        after(clip)


def test_a_corpus_of_nothing_says_to_name_larger_files(teacher: TextTeacher) -> None:
    with pytest.raises(UserError, match=r"holds 1 usable sentences; name larger files"):
        pretrained(teacher, [("a red circle",)], GLOSSARY, CONFIG, seed=0, progress=QuietProgress())


@pytest.mark.parametrize(
    ("options", "documents"),
    [
        ({}, [("red",), ("blue",), ("a river",)]),
        ({"mlm_weight": 0.0, "order_weight": 1.0}, [("red",), ("blue",), ("a river", "stone")]),
        ({"mlm_weight": 0.0, "term_weight": 1.0}, [("red",), ("blue",), ("a circle",)]),
    ],
)
def test_a_batch_without_a_case_of_what_is_asked_is_read_all_the_same(
    teacher: TextTeacher, options: dict[str, Any], documents: list[tuple[str, ...]]
) -> None:
    config = msgspec.structs.replace(CONFIG, batch_size=1, epochs=4, **options)
    with seeded(0, threads=1):
        told = pretrained(teacher, documents, GLOSSARY, config, seed=0, progress=QuietProgress())
    assert np.isfinite(told["curve"]).all()


@pytest.mark.parametrize("weight", ["order_weight", "term_weight"])
def test_a_corpus_without_a_case_of_what_is_asked_says_what_to_set(teacher: TextTeacher, weight: str) -> None:
    config = msgspec.structs.replace(CONFIG, **{"mlm_weight": 0.0, weight: 1.0})
    with pytest.raises(UserError, match=r"; set teacher\.pretraining\.mlm_weight above 0$"):
        pretrained(teacher, [("red",), ("blue",)], GLOSSARY, config, seed=0, progress=QuietProgress())


def test_a_reading_at_another_length_is_another_reading() -> None:
    wanted = TeacherConfig(pretraining=msgspec.structs.replace(CONFIG, corpus=("cldr",), anchor_weight=1.0))
    short, long = (PretrainingStage(wanted, seed=0, max_length=length) for length in (4, 32))
    assert short.key({}) != long.key({}), "what an anchor keeps is what the tower says at that length"


def test_documents_are_read_from_files_and_from_cldr(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One. Two!\nthree\n\n第一句。第二句！\n", "utf-8")  # noqa: RUF001
    assert [list(one) for one in documents_from_file(tmp_path / "a.txt")] == [
        ["One.", "Two!", "three"], ["第一句。", "第二句！"]  # noqa: RUF001
    ]  # fmt: skip
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Red. Round.", "more": 1}) + "\n")
    assert [list(one) for one in documents_from_file(tmp_path / "b.jsonl")] == [["Red.", "Round."]]
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"cannot read the corpus .*c\.jsonl.*give UTF-8"):
        list(documents_from_file(tmp_path / "c.jsonl"))
    data = {"annotations": {"annotations": {"x": {"default": ["apple", "red"], "tts": ["red apple"]}}}}
    assert list(documents_from_cldr(json.dumps(data).encode())) == [["red apple", "apple, red"]]


def test_a_glossary_in_another_encoding_than_the_cleaned_texts_finds_its_terms(tmp_path: Path) -> None:
    (tmp_path / "g.tsv").write_text("cafe\u0301\n\uff21\u6b3e\u624b\u67c4\n", "utf-8")
    found = glossary_from_file(tmp_path / "g.tsv").spans("The Caf\u00e9 has an A\u6b3e\u624b\u67c4 .")
    assert [span.term for span in found] == [0, 1]


def test_a_glossary_finds_the_longest_term_in_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "g.tsv").write_text("# terms\nred apple\tpomme rouge\nApple\n苹果\n", "utf-8")
    glossary = glossary_from_file(tmp_path / "g.tsv")
    text = "A Red-Apple, an apple, pineapple, pomme rouge, 青苹果派"
    assert [(text[s.start : s.end], s.term) for s in glossary.spans(text)] == [
        ("Red-Apple", 0), ("apple", 1), ("pomme rouge", 0), ("苹果", 2)
    ]  # fmt: skip
    (tmp_path / "de.tsv").write_text("Straße\tWeg\nGroße Straße\n", "utf-8")
    text = "Die STRASSE ist eine große Straße."
    found = glossary_from_file(tmp_path / "de.tsv").spans(text)
    assert [text[s.start : s.end] for s in found] == ["STRASSE", "große Straße"]
    (tmp_path / "one.txt").write_text("apple\n")
    with pytest.raises(UserError, match="has 1 terms; give two or more"):
        glossary_from_file(tmp_path / "one.txt")


@pytest.mark.parametrize(
    ("text", "term"),
    [("打开WiFi开关", "WiFi"), ("插入U盘后", "U盘"), ("用3D打印机", "3D打印"), ("买 apple 和wifi6", None)],
)
def test_a_term_of_another_script_is_found_within_chinese(text: str, term: str | None) -> None:
    glossary = Glossary([("wifi",), ("u盘",), ("3d打印",), ("pineapple",)])
    assert [text[s.start : s.end] for s in glossary.spans(text)] == ([term] if term else [])


def test_nothing_that_is_evaluated_is_read(tmp_path: Path) -> None:
    pairs = PairSet.open(write_synthetic_pairs(tmp_path / "pairs", size=16))
    trained = set(pairs.training_texts())
    held = {text for row in pairs.rows if row.role == "held" for text in row.captions} - trained
    asked = {query.text for track in pairs.tracks for query in track.queries} - trained
    forbidden = evaluated_texts(pairs)
    assert all(forbidden(f"{text.upper()}.") for text in held | asked)
    assert not any(forbidden(text) for text in trained)
    counts: Counter[str] = Counter()
    documents = [[row.text, "and what is said of it"] for row in pairs.rows]
    kept = {document[0] for document in without_unseen(iter(documents), pairs, counts)}
    assert kept == {row.text for row in pairs.rows if row.role == "labelled"}
    assert counts["about an unseen concept"] > 0
    assert {spelling for term in glossary_from_pairs(pairs).terms for spelling in term} == trained


def test_a_name_beside_a_title_is_replaced_in_a_file_as_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(
        "It was signed by Mr. Smith today. Dr. J. R. Doe agreed! Was it Prof. Ann B. Miller? Yes.\n"
    )
    counts: Counter[str] = Counter()
    assert list(cleaned(documents_from_file(tmp_path / "own.txt"), by_patterns, counts)) == [
        ("It was signed by Mr. <NAME> today.", "Dr. <NAME> agreed!", "Was it Prof. <NAME>?", "Yes.")
    ]
    assert counts == {"NAME": 3}


def test_a_name_with_a_title_that_is_held_out_is_known_again_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Mrs. Claus\nThe wife of a man in red.\n\nA cook.\n")
    found = without_unseen(
        documents_from_file(tmp_path / "own.txt"), asking("x", "mrs-claus", "y"), Counter()
    )
    assert list(found) == [["A cook."]]


@pytest.mark.parametrize("name", ["own.jsonl", "own.txt"])
def test_a_held_caption_of_several_sentences_is_not_read_sentence_by_sentence(
    tmp_path: Path, name: str
) -> None:
    held, trained = "A red cup. It stands on a shelf.", "A blue bowl. It is full of soup."
    pairs: Any = SimpleNamespace(
        tracks=[SimpleNamespace(queries=[SimpleNamespace(text=held)])],
        rows=[SimpleNamespace(role="held", concept="x", captions=(held,))],
        training_texts=lambda: (trained,),
    )
    lines = [held, trained, "The shelf is made of wood."]
    written = [json.dumps({"text": line}) for line in lines] if name.endswith("l") else lines
    (tmp_path / name).write_text("\n".join(written))
    counts: Counter[str] = Counter()
    found = without_unseen(documents_from_file(tmp_path / name), pairs, counts)
    read = cleaned(found, by_patterns, counts, forbidden=evaluated_texts(pairs))
    assert [sentence for document in read for sentence in document] == [
        "A blue bowl.", "It is full of soup.", "The shelf is made of wood.",
    ]  # fmt: skip
    assert counts == {"asked for by an evaluation": 2}


def test_what_is_evaluated_is_known_again_in_full_width_signs_and_markup() -> None:
    query = SimpleNamespace(text="红苹果，很大！")  # noqa: RUF001
    held = SimpleNamespace(role="held", concept="pear", captions=("绿梨（大）",))  # noqa: RUF001
    pairs: Any = SimpleNamespace(
        tracks=[SimpleNamespace(queries=[query])], rows=[held], training_texts=lambda: ()
    )
    counts: Counter[str] = Counter()
    raw = [["红苹果，很大！", "绿梨（大）", "红苹果，很大的树"]]  # noqa: RUF001
    assert list(cleaned(raw, by_patterns, counts, forbidden=evaluated_texts(pairs))) == [("红苹果,很大的树",)]
    assert counts == {"asked for by an evaluation": 2}
    documents = [["<b>绿梨（大）</b>。", "a pear"], ["an apple"]]  # noqa: RUF001
    assert list(without_unseen(iter(documents), pairs, counts)) == [["an apple"]]


def asking(query: str, concept: str, *captions: str) -> Any:
    """Return pairs that ask one query, and hold one concept out under its captions."""
    held = SimpleNamespace(role="held", concept=concept, captions=captions)
    tracks = [SimpleNamespace(queries=[SimpleNamespace(text=query)])]
    return SimpleNamespace(tracks=tracks, rows=[held], training_texts=lambda: ("a cook",))


@pytest.mark.parametrize(
    ("concept", "called"),
    [
        ("mrs-claus", "Mrs. Claus"),
        ("eleven-oclock", "eleven o\u2019clock"),
        ("keycap-6", "keycap: 6"),
        ("cafe-table", "caf\u00e9 tables"),
    ],
)
def test_a_name_that_is_held_out_is_known_again_however_it_is_spelt(concept: str, called: str) -> None:
    counts: Counter[str] = Counter()
    pairs = asking("red", concept, concept.replace("-", " "))
    assert list(without_unseen(iter([[called, "what else it is called"]]), pairs, counts)) == []
    assert evaluated_texts(pairs)(f"{called}!")
    chinese = asking("red", concept, "\u5b83")
    assert list(without_unseen(iter([[called, "what else it is called"]]), chinese, counts)) == []
    assert not evaluated_texts(pairs)("a cook.")


def test_a_sentence_that_is_asked_for_is_not_read_without_its_name_either() -> None:
    counts: Counter[str] = Counter()
    pairs = asking("Mr. Smith on a boat", "x", "x")
    raw = [["Mr. Smith on a boat.", "Mr. Smith on a red boat"]]
    read = list(cleaned(raw, by_patterns, counts, forbidden=evaluated_texts(pairs)))
    assert read == [("Mr. <NAME> on a red boat",)]


def test_names_of_emoji_are_read_in_the_languages_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def member(_: Any, name: str) -> bytes:
        said = "\u82f9\u679c" if "/zh/" in name else "apple"
        return json.dumps({"annotations": {"annotations": {"x": {"tts": [said]}}}}).encode()

    monkeypatch.setattr("edgeglm.adapt.corpora.asset_member", member)
    config = msgspec.structs.replace(CONFIG, corpus=("cldr",))
    inputs: Any = {"cldr-annotations": None}
    read = [next(iter(document)) for document in documents_of(inputs, config, ("zh", "en"))]
    assert read == ["\u82f9\u679c", "apple"]
