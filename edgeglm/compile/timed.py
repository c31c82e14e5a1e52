"""Which candidate is the fastest here: one picture and one text, all candidates in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from edgeglm.bundle.goldens import goldens
from edgeglm.bundle.opened import Bundle
from edgeglm.data.tokenization import Tokenizer
from edgeglm.data.transforms import model_input_from_files
from edgeglm.engines.profiles import in_length_bucket
from edgeglm.engines.protocol import Engine, Feeds
from edgeglm.engines.timing import compare_latency

MakeEngine = Callable[[Path, int], Engine]
"""Makes an engine of (ONNX file in the bundle, threads)."""

_SAME = 0.97
"""A candidate is only called faster when it takes less than this share of the other's time."""


def single_times(
    bundle: Bundle, makers: Mapping[str, MakeEngine], *, threads: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Return ``{variant: {"<tower>_b1_ms": median milliseconds}}`` of a batch of one."""
    times: dict[str, dict[str, float]] = {name: {} for name in makers}
    for tower, feed in _single_feeds(bundle).items():
        with ExitStack() as opened:
            engines = {
                name: (opened.enter_context(make(bundle.model(name, tower), threads)), feed)
                for name, make in makers.items()
            }
            for name, latency in compare_latency(engines, rounds=rounds).items():
                times[name][f"{tower}_b1_ms"] = round(latency.median_ms, 4)
    return times


def fastest(bundle: Bundle, timed: Mapping[str, Mapping[str, float]]) -> str:
    """Return the fastest variant; of those that are as fast, the bundle's default, then its order."""
    totals = {name: sum(times.values()) for name, times in timed.items()}
    least = min(totals.values())
    level = [name for name, total in totals.items() if least >= total * _SAME]
    default = bundle.manifest.default_variant
    return default if default in level else level[0]


def _single_feeds(bundle: Bundle) -> dict[str, Feeds]:
    """Return one golden picture and one golden text as model input, filled up as a runner would."""
    inputs, preprocessing = goldens(bundle), bundle.preprocessing
    tokenizer = Tokenizer(bundle.tokenizer_path, lowercase=preprocessing.text.lowercase)
    ids, mask = tokenizer.encode(list(inputs.texts[:1]), max_length=preprocessing.text.max_length)
    ids = in_length_bucket(ids, preprocessing.text.max_length, tokenizer.pad_id)
    mask = in_length_bucket(mask, preprocessing.text.max_length, 0)
    pixels = model_input_from_files(list(inputs.images[:1]), preprocessing.image)
    return {"image": {"pixels": pixels}, "text": {"input_ids": ids, "attention_mask": mask}}
