"""If these fail, a figure depends on the company in which a text or an image was embedded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edgeglm.data.pairs import Query, Track  # noqa: E402
from edgeglm.data.tokenization import Tokenizer  # noqa: E402
from edgeglm.data.transforms import ImagePreprocessing  # noqa: E402
from edgeglm.evaluate import towers as room  # noqa: E402
from edgeglm.evaluate.towers import (  # noqa: E402
    TextSettings,
    gallery_images,
    image_embeddings,
    text_embeddings,
    token_embeddings,
    towers_on_tracks,
)
from scripts.fixtures.colours import SIDE, colour_tower  # noqa: E402
from tests.tiny_towers import write_wordpiece  # noqa: E402

helper, types = onnx.helper, onnx.TensorProto
WORDS = ("red", "green", "blue", "dark")
#: The embedding of a text is the sum over its attended tokens: [PAD] [UNK] [CLS] [SEP] and the words.
TABLE = [[9, 9, 9], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    names = ("input_ids", "attention_mask")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=types.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["rows", "mask3"], ["seen"]),
            helper.make_node("ReduceSum", ["seen", "middle"], ["embedding"], keepdims=0),
        ],
        "text",
        [helper.make_tensor_value_info(name, types.INT64, ["batch", "length"]) for name in names],
        [helper.make_tensor_value_info("embedding", types.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("table", types.FLOAT, [len(TABLE), 3], np.ravel(TABLE).astype(float)),
            helper.make_tensor("last", types.INT64, [1], [2]),
            helper.make_tensor("middle", types.INT64, [1], [1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "text.onnx").write_bytes(model.SerializeToString())
    (folder / "image.onnx").write_bytes(colour_tower("image"))
    return {tower: folder / f"{tower}.onnx" for tower in ("image", "text")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextSettings:
    path = write_wordpiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", WORDS)
    return TextSettings(tokenizer=Tokenizer(path), max_length=16)


def expected(text: str) -> list[float]:
    rows = [TABLE[4 + WORDS.index(word)] for word in text.split()]
    return [float(sum(column)) for column in zip(*rows, strict=True)]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12
    ),
    batch=st.integers(1, 5),
)
def test_each_text_gets_its_own_embedding_in_any_order_and_company(
    texts: list[str], batch: int, files: dict[str, Path], text: TextSettings
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "BATCH", batch)
        found = text_embeddings(files["text"], texts, text, threads=1)
    np.testing.assert_allclose(found, [expected(one) for one in texts])


def test_no_text_gives_no_row(files: dict[str, Path], text: TextSettings) -> None:
    assert len(text_embeddings(files["text"], [], text, threads=1)) == 0


def test_each_chosen_entry_of_the_vocabulary_is_embedded_alone(
    files: dict[str, Path], text: TextSettings
) -> None:
    for entries in (np.arange(len(TABLE)), np.array([6, 1, 4])):
        found = token_embeddings(files["text"], text.tokenizer, entries, threads=1)
        np.testing.assert_allclose(found, np.array(TABLE)[entries])


def pictures(count: int) -> np.ndarray:
    values = np.arange(count * 3).reshape(count, 1, 1, 3) * (255 // (count * 3))
    return np.broadcast_to(values, (count, SIDE, SIDE, 3)).astype(np.uint8)


def test_chosen_images_come_in_the_order_asked(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BATCH", 3)
    images, chosen = pictures(10), [7, 0, 9, 3, 2, 5, 1]
    found = image_embeddings(
        files["image"], images, chosen, preprocessing=ImagePreprocessing(resolution=SIDE), threads=1
    )
    np.testing.assert_allclose(found, images[chosen].mean((1, 2)) / 255, atol=1e-5)


def track(name: str, queries: dict[str, tuple[int, ...]], gallery: tuple[int, ...]) -> Track:
    asked = tuple(Query(text=words, relevant=found) for words, found in queries.items())
    return Track(name=name, title=name, query_kind="names", queries=asked, gallery=gallery)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_metrics_do_not_hang_on_the_size_of_a_batch(
    batch: int, files: dict[str, Path], text: TextSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BATCH", batch)
    images = np.zeros((6, SIDE, SIDE, 3), np.uint8)
    for i, channel in enumerate((0, 1, 2, 0)):
        images[i + 1, :, :, channel] = 255 - i
    tracks = [
        track("all", {"red": (1, 4), "green": (2,), "blue blue blue": (3,)}, (1, 2, 3, 4)),
        track("turned", {"red": (2,), "green": (1,)}, (1, 2)),
    ]
    metrics, rows = towers_on_tracks(
        files, tracks, images, preprocessing=ImagePreprocessing(resolution=SIDE), text=text, threads=1
    )
    assert metrics["all"].map10.value == metrics["all"].r1 == metrics["all"].r1_i2t == 1.0
    assert metrics["turned"].map10.value == 0.5
    assert metrics["turned"].r1 == 0.0
    assert gallery_images(tracks) == [1, 2, 3, 4]
    np.testing.assert_allclose(rows[1:5], images[1:5].mean((1, 2)) / 255, atol=1e-5)
    assert not rows[[0, 5]].any(), "images in no gallery are not embedded"
