"""A tokenizer with fewer entries that splits what it kept exactly as the whole one does.

Most of a small text tower is its vocabulary, and most of a vocabulary is never met in a domain. What is
kept: special entries, single characters and bytes (so that every text still has tokens), the entries of the
domain's texts with all that they are merged from, and then the most frequent others, which come first in the
file.

Every text whose tokens were all kept gets the same tokens in the same places: WordPiece takes the longest
entry that fits, Unigram the most probable split, BPE the earliest merge, and taking other entries away
changes none of these. (Vocabulary pruning: Abdaoui et al., "Load what you need", 2020.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.data.tokenization import Ids, Tokenizer

_KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
#: Marks in front of an entry that starts or goes on with a word; a character may follow one.
_MARKS = ("##", "\u2581", "\u0120")


@dataclass(frozen=True, kw_only=True)
class TrimmedTokenizer:
    """The text of a ``tokenizer.json``, and int64 [W]: the former id of each of its entries, ascending."""

    text: str
    kept: Ids


def trimmed_tokenizer(
    path: Path, texts: Sequence[str], *, count: int, lowercase: bool, key: str = "student.vocabulary"
) -> TrimmedTokenizer:
    """Return the tokenizer with ``count`` entries.

    Args:
        path: A ``tokenizer.json`` of WordPiece, BPE, Unigram or whole words.
        texts: Whose tokens must be kept: the domain's captions.
        count: How many entries; with as many as there are or more, all are kept.
        lowercase: Whether texts are lowered before they are split.
        key: What the recipe calls ``count``, for messages.

    Raises:
        UserError: The kind is not known, or ``count`` cannot hold what must be kept.
    """
    tree: dict[str, Any] = json.loads(path.read_text("utf-8"))
    model = tree["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind not in _KINDS:
        raise unknown_name("kind of tokenizer that can be trimmed", str(kind), _KINDS)
    entries = _entries(model, kind) | {token["content"]: int(token["id"]) for token in tree["added_tokens"]}
    needed = _needed(tree, model, entries)
    ids, mask = Tokenizer(path, lowercase=lowercase).encode(list(texts), max_length=1 << 16)
    needed |= {int(i) for i in np.unique(ids[mask == 1])}
    merged = _Merged(model, entries) if kind == "BPE" else None
    if merged is not None:
        needed |= merged.parts(needed)
    if len(needed) > count:
        raise UserError(
            f"{key} is {count}, but single characters, special entries and the captions take "
            f"{len(needed)}; raise it to that, or to 0 for the whole vocabulary"
        )
    wanted = set(needed)
    for entry in sorted(entries.values()):
        if len(wanted) >= count:
            break
        if entry not in wanted:
            more = {entry} if merged is None else {entry} | merged.parts({entry})
            if len(wanted | more) <= count:
                wanted |= more
    kept = np.array(sorted(wanted), np.int64)
    _renumber(tree, kind, {int(old): new for new, old in enumerate(kept)})
    return TrimmedTokenizer(text=json.dumps(tree, ensure_ascii=False, indent=1), kept=kept)


def _entries(model: dict[str, Any], kind: str) -> dict[str, int]:
    if kind == "Unigram":
        return {token: i for i, (token, _) in enumerate(model["vocab"])}
    return {token: int(i) for token, i in model["vocab"].items()}


def _needed(tree: dict[str, Any], model: dict[str, Any], entries: dict[str, int]) -> set[int]:
    """Return the ids of special entries and of single characters and bytes."""
    found = {int(token["id"]) for token in tree["added_tokens"]}
    found |= {int(i) for _, i in _named_ids(tree)}
    unknown = model.get("unk_token")
    if unknown in entries:
        found.add(entries[unknown])
    if isinstance(model.get("unk_id"), int):
        found.add(model["unk_id"])
    for token, number in entries.items():
        bare = token
        for mark in _MARKS:
            bare = bare.removeprefix(mark)
        bare = bare.removesuffix("</w>")
        if len(bare) <= 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">")):
            found.add(number)
    return found


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
    return [(first, second) for first, second in pairs]


class _Merged:
    """What each entry of a BPE is merged from."""

    def __init__(self, model: dict[str, Any], entries: dict[str, int]) -> None:
        self._from: dict[int, set[int]] = {}
        for first, second in _merges(model):
            whole = entries.get(_joined(first, second, model))
            if whole is not None and first in entries and second in entries:
                self._from.setdefault(whole, set()).update((entries[first], entries[second]))

    def parts(self, wanted: set[int]) -> set[int]:
        """Return all that the wanted entries are merged from, by any merge."""
        waiting, found = list(wanted), set[int]()
        while waiting:
            for part in self._from.get(waiting.pop(), set()) - found:
                found.add(part)
                waiting.append(part)
        return found


def _named_ids(tree: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield what the post-processor and the padding name by number."""
    for processor in _processors(tree.get("post_processor")):
        for key in ("sep", "cls"):
            if isinstance(processor.get(key), list):
                yield processor[key][0], processor[key][1]
        for special in (processor.get("special_tokens") or {}).values():
            yield from zip(special["tokens"], special["ids"], strict=True)
    if tree.get("padding"):
        yield tree["padding"]["pad_token"], tree["padding"]["pad_id"]


def _processors(node: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if node is None:
        return
    if node.get("type") == "Sequence":
        for child in node["processors"]:
            yield from _processors(child)
    else:
        yield node


def _renumber(tree: dict[str, Any], kind: str, new_id: dict[int, int]) -> None:
    """Write the new numbers wherever the file has old ones, and drop what has none."""
    model = tree["model"]
    if kind == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = new_id[model["unk_id"]]
    else:
        model["vocab"] = {token: new_id[i] for token, i in model["vocab"].items() if i in new_id}
    if kind == "BPE":
        kept = model["vocab"]
        model["merges"] = [
            [first, second]
            for first, second in _merges(model)
            if first in kept and second in kept and _joined(first, second, model) in kept
        ]
    for token in tree["added_tokens"]:
        token["id"] = new_id[int(token["id"])]
    for processor in _processors(tree.get("post_processor")):
        for key in ("sep", "cls"):
            if isinstance(processor.get(key), list):
                processor[key][1] = new_id[processor[key][1]]
        for special in (processor.get("special_tokens") or {}).values():
            special["ids"] = [new_id[i] for i in special["ids"]]
    if tree.get("padding"):
        tree["padding"]["pad_id"] = new_id[tree["padding"]["pad_id"]]


def _joined(first: str, second: str, model: dict[str, Any]) -> str:
    prefix = model.get("continuing_subword_prefix") or ""
    return first + (second.removeprefix(prefix) if prefix else second)
