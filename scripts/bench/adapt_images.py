"""The finalists of `adapt.py` at image level: the recipe's teacher, its last image blocks tuned on pictures.

    EDGEGLM_STORE=STORE .venv/bin/python scripts/bench/adapt_images.py [--seeds 3] [--threads 1] [--share I/N]

STORE is one in which the recipe `default` was built: its pairs, its features and its pretrained towers
are used. Each way trains the whole teacher twice, with equal seeds: on the cached features of the frozen
backbone, and on those of the backbone after `teacher.image_blocks` of its last blocks were tuned on
pictures by that very way. Two settings: labels of one style (the other three are not used in any form)
and of four. What the frozen blocks say to all views is computed once and kept in --scratch (440 MB).
Writes docs/bench/adapt_images.json after each teacher, goes on from it when called again, and writes
adapt_images.md from it. `--share I/N` runs every N-th pair of teachers from the I-th on; `--merge FILE
...` takes in what shares found.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import adapt  # noqa: E402
from bench_store import Share, add_seeds, add_share, bench_parser, interval, kept_figures, newest, origin  # noqa: E402

from edgeglm.adapt.alignment import Alignment  # noqa: E402
from edgeglm.adapt.backbones import image_module, read_backbones  # noqa: E402
from edgeglm.adapt.domains import Domains  # noqa: E402
from edgeglm.adapt.image_tuning import TunedBlocks, front_maps  # noqa: E402
from edgeglm.adapt.image_tuning_stage import TUNABLE  # noqa: E402
from edgeglm.adapt.sources import source_spec  # noqa: E402
from edgeglm.adapt.text_teacher import load_text_teacher  # noqa: E402
from edgeglm.assets import fetch_asset  # noqa: E402
from edgeglm.core.artifact import Artifact  # noqa: E402
from edgeglm.core.progress import QuietProgress  # noqa: E402
from edgeglm.core.recipe import DomainConfig, TeacherConfig  # noqa: E402
from edgeglm.core.store import Store  # noqa: E402
from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE  # noqa: E402
from edgeglm.evaluate.towers import gallery_images  # noqa: E402
from edgeglm.models.efficientnet_lite import SpatialLite0  # noqa: E402
from edgeglm.train.concepts import Concepts  # noqa: E402
from edgeglm.train.loop import seeded  # noqa: E402

BLOCKS = 5
ROUNDS = adapt.ROUNDS
#: The first row of `adapt.md`, and what did best there with labels of one style: pseudo-labels alone, and
#: with what led among pictures that were there unlabelled (MMD) and among those never seen (the curriculum).
FINALISTS: dict[str, tuple[DomainConfig, str]] = {
    "no unlabelled images": (DomainConfig(), "-"),
    "pseudo-labels": (DomainConfig(pseudo_label_rounds=ROUNDS), "Lee, 2013"),
    "MMD, weight 10 + pseudo-labels": (
        DomainConfig(mmd_weight=10.0, pseudo_label_rounds=ROUNDS),
        "Long et al., DAN, 2015; Lee, 2013",
    ),
    "curriculum of statistics + pseudo-labels": (
        DomainConfig(curriculum=1.0, pseudo_label_rounds=ROUNDS),
        "MixStyle, 2021; AdaBN, 2016; Lee, 2013",
    ),
}
LEVELS = {"cached": "frozen backbone", "images": f"last {BLOCKS} blocks tuned"}


@dataclass(frozen=True, kw_only=True)
class Material:
    """What every run starts from; ``maps_VN`` are of all images."""

    store: Store
    pairs: PairSet
    features_VNF: Tensor
    maps_VN: Tensor
    image: Artifact
    text: Artifact
    resolution: int


def prepared(store: Store, scratch: Path, threads: int) -> Material:
    """Open what the default build left, and make the maps once."""
    config, progress = TeacherConfig(), QuietProgress()
    (backbone,) = read_backbones(newest(store, "backbones").path)
    features = np.load(newest(store, "features").path / "features.npy", mmap_mode="c")
    if backbone.name != TUNABLE or features.shape[2] != backbone.features:
        raise SystemExit(f"the newest features in {store.root} are not of {TUNABLE} alone; build `default`")
    pairs, image = PairSet.open(newest(store, "pairs")), fetch_asset(TUNABLE, store, progress)
    folder = scratch / f"adapt-images-{BLOCKS}"
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        front_maps(
            _tower(image, backbone.resolution), BLOCKS, pairs, list(range(len(pairs))), folder,
            views=len(features), seed=0, resolution=backbone.resolution, threads=threads, progress=progress,
        )  # fmt: skip
        (folder / "whole").touch()
    return Material(
        store=store,
        pairs=pairs,
        features_VNF=torch.from_numpy(features),
        maps_VN=torch.from_numpy(np.load(folder / "maps.npy", mmap_mode="c")),
        image=image,
        text=fetch_asset(source_spec(config.text), store, progress),
        resolution=backbone.resolution,
    )


def _tower(image: Artifact, resolution: int) -> SpatialLite0:
    tower, _ = image_module(TUNABLE, image, resolution)
    assert isinstance(tower, SpatialLite0)
    return tower


def run(
    given: Material, styles: tuple[str, ...], domain: DomainConfig, level: str, seed: int, threads: int
) -> dict[str, Any]:
    """Train one teacher of the recipe and measure it."""
    pairs, started, cpu = adapt.restricted(given.pairs, styles), time.perf_counter(), time.process_time()
    config = TeacherConfig(domain=domain, image_blocks=BLOCKS if level == "images" else 0)
    seconds: dict[str, float] = {}
    features = given.features_VNF
    if level == "images":
        with seeded(seed, threads=threads):
            features = _tuned_features(given, pairs, config, seed)
        seconds["pictures"] = round(time.perf_counter() - started, 1)
    with given.store.scratch() as folder, seeded(seed, threads=threads):
        made = _alignment(given, pairs, features, config, seed, folder)
        made.run()
        found = adapt.measured(made, pairs, made.text)
    seconds["all"] = round(time.perf_counter() - started, 1)
    return {"map10": found, "seconds": seconds, "cpu_s": round(time.process_time() - cpu, 1)}


def _alignment(
    given: Material, pairs: PairSet, features: Tensor, config: TeacherConfig, seed: int, folder: Path
) -> Alignment:
    text = load_text_teacher(config.text, given.text, folder / "text", max_length=32)
    concepts = Concepts.of(pairs)
    domains = Domains.of(pairs, concepts) if config.domain.uses_unlabelled() else None
    return Alignment(features, concepts, text, config, seed=seed, progress=QuietProgress(), domains=domains)


def _tuned_features(given: Material, pairs: PairSet, config: TeacherConfig, seed: int) -> Tensor:
    """Tune the blocks as the stage image-tuning does, and return the features of all that is used."""
    tower = _tower(given.image, given.resolution)
    blocks = TunedBlocks(tower, BLOCKS, given.features_VNF, given.maps_VN, range(len(pairs)))
    with given.store.scratch() as folder:
        frozen_text = msgspec.structs.replace(config, lora_epochs=0)
        made = _alignment(given, pairs, given.features_VNF, frozen_text, seed, folder)
        made.run()
        made.tune_images(blocks)
    used = np.union1d(pairs.by_role("labelled", "unlabelled"), gallery_images(pairs.tracks))
    found = given.features_VNF.clone()
    with torch.no_grad():
        for view in range(len(found)):
            for start in range(0, len(used), 128):
                image_B = torch.from_numpy(used[start : start + 128])
                found[view, image_B] = blocks.read(torch.full_like(image_B, view), image_B).half()
    return found


def page(found: dict[str, Any]) -> str:
    """Return the whole page."""
    lines = [
        "# The finalists at image level",
        "",
        f"Made by `{found['command']}` at commit {found['commit']} on {found['machine']}.",
        "",
        "mAP@10, target twemoji (gallery of 1,652; unseen concepts: gallery of 165), mean over seeds with "
        "the 95 % interval of Student's t. The teacher of the recipe `default`, with LoRA, on the features "
        f"of the frozen EfficientNet-Lite0, and on those after its last {BLOCKS} blocks were tuned on "
        "pictures by the same way (`teacher.image_blocks`). 'mean view' ranks by the mean embedding over "
        f"the plain picture and three augmented copies. {ONE_RELEVANT_NOTE}",
        "",
    ]
    for setting in adapt.SETTINGS:
        lines += [
            f"## {setting} -> twemoji",
            "",
            "| way | source | image tower | seeds | transductive | inductive | unseen "
            "| transductive, mean view | keywords (trans. / ind. / unseen) | CPU s |",
            "| --- | --- | --- | ---: | --- | --- | --- | --- | --- | ---: |",
        ]
        for name, (_, source) in FINALISTS.items():
            for level, title in LEVELS.items():
                runs = list(found["runs"].get(setting, {}).get(name, {}).get(level, {}).values())
                if not runs:
                    continue
                scores = {track: [run["map10"][track] for run in runs] for track in runs[0]["map10"]}
                cells = [interval([plain for plain, _ in scores[track]]) for track in adapt.TRACKS]
                cells.append(interval([mean for _, mean in scores[adapt.TRACKS[0]]]))
                words = " / ".join(
                    f"{statistics.mean(plain for plain, _ in scores[f'{track}-keywords']):.3f}"
                    for track in adapt.TRACKS
                )
                seconds = statistics.mean(run["cpu_s"] for run in runs)
                lines.append(
                    f"| {name} | {source} | {title} | {len(runs)} | {' | '.join(cells)} | {words} "
                    f"| {seconds:.0f} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = bench_parser(__doc__)
    add_seeds(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=list(adapt.SETTINGS), help="one setting alone")
    parser.add_argument("--way", choices=list(FINALISTS), help="one way alone")
    add_share(parser, adapt.OUT)
    options = parser.parse_args()
    path = options.output / "adapt_images.json"
    found = kept_figures(path, options.merge)
    found.setdefault("runs", {})
    if not options.table and not options.merge:
        said = f"scripts/bench/adapt_images.py --seeds {options.seeds} --threads {options.threads}"
        found |= {"command": said, **origin()}
        given = prepared(Store(Path(os.environ["EDGEGLM_STORE"])), options.scratch, options.threads)
        _run_all(found, path, given, options)
    path.write_text(json.dumps(found, indent=1) + "\n")
    (options.output / "adapt_images.md").write_text(page(found))


def _run_all(found: dict[str, Any], path: Path, given: Material, options: argparse.Namespace) -> None:
    share = Share(options.share)
    for seed in range(options.seeds):
        for setting, styles in adapt.SETTINGS.items():
            for name, (domain, _) in FINALISTS.items():
                taken = share.takes()
                if not taken or options.only not in (None, setting) or options.way not in (None, name):
                    continue
                for level in LEVELS:
                    done = found["runs"].setdefault(setting, {}).setdefault(name, {}).setdefault(level, {})
                    if str(seed) in done:
                        continue
                    done[str(seed)] = run(given, styles, domain, level, seed, options.threads)
                    path.write_text(json.dumps(found, indent=1) + "\n")
                    sys.stderr.write(f"{setting}, {name}, {level}, seed {seed}: {done[str(seed)]}\n")


if __name__ == "__main__":
    main()
