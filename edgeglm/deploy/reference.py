"""mAP@10 of a bundle on a reference set, on the device, through what finalize chose there.

A reference is a folder with ``pairs.jsonl``, a line ``{"image": "red.png", "text": "a red apple"}`` each. All
its images are the gallery, its texts the queries; an image answers every text that it stands beside.

    python -m edgeglm.deploy.reference BUNDLE FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgeglm.bundle.paths import name_problem
from edgeglm.core.errors import EdgeglmError, UserError

PAIRS_NAME = "pairs.jsonl"
_MAX_PAIRS = 20_000


class ReferencePair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line: an image, by its path in the folder, and a text that it answers."""

    image: str
    text: str


def read_pairs(folder: Path) -> list[ReferencePair]:
    """Read ``pairs.jsonl``. Raises UserError that names the line."""
    place = folder / PAIRS_NAME
    try:
        lines = place.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the reference {place}: {error.strerror}; give a folder with {PAIRS_NAME}"
        ) from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            pair = msgspec.json.decode(line, type=ReferencePair)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UserError(f"{place}, line {number}: {error}; mend that line") from error
        if (problem := name_problem(pair.image)) is not None:
            raise UserError(f"{place}, line {number}: the image {pair.image!r} {problem}; mend that line")
        pairs.append(pair)
    if not 1 < len(pairs) <= _MAX_PAIRS:
        raise UserError(f"{place} has {len(pairs)} pairs; give 2 to {_MAX_PAIRS}")
    return pairs


def reference_map10(bundle_path: Path, folder: Path, *, allow_unsigned: bool = False) -> float:
    """Return mAP@10, text to image, of the variant and the engines that run here. Raises UserError."""
    from edgeglm.bundle.trust import trust_here
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.evaluate.retrieval import evaluate_track
    from edgeglm.runtime.finalized import choice_here
    from edgeglm.runtime.retrieval import Retriever

    pairs = read_pairs(folder)
    images = sorted({pair.image for pair in pairs})
    texts = sorted({pair.text for pair in pairs})
    place = {name: row for row, name in enumerate(images)}
    relevant: Sequence[list[int]] = [
        sorted({place[pair.image] for pair in pairs if pair.text == text}) for text in texts
    ]
    trust = trust_here(allow_unsigned=allow_unsigned, allow_downgrade=True)
    with open_bundle(bundle_path, trust=trust) as bundle:
        choice = choice_here(bundle)
        with Retriever(bundle, variant=choice.variant, engine=choice.engine) as retriever:
            rows = retriever.embed_images([folder / name for name in images])
            queries = retriever.embed_text(texts)
    return evaluate_track(queries, rows, relevant, bootstrap=1).map10.value


def main(arguments: Sequence[str]) -> int:
    """Print ``{"map10": ...}``, or an error as the command line does."""
    bundle, folder, *flags = arguments
    try:
        value = reference_map10(Path(bundle), Path(folder), allow_unsigned="--allow-unsigned" in flags)
    except EdgeglmError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps({"map10": value}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
