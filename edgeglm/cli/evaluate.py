"""`edgeglm evaluate`: any metrics of a bundle or a teacher on one's own pairs, with checks and times."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options
from edgeglm.core.errors import UserError
from edgeglm.core.words import human_bytes

if TYPE_CHECKING:
    from edgeglm.bundle.opened import Bundle
    from edgeglm.data.records import BadRecords
    from edgeglm.evaluate.evaluator import ClassificationTask, Figure
    from edgeglm.evaluate.teacher_towers import TeacherTowers
    from edgeglm.runtime.evaluation import Checks, Embedded, Embedder, Item, LengthChecks, Percentiles
    from edgeglm.runtime.retrieval import Retriever


@click.command(name="evaluate")
@bundle_argument
@click.option(
    "--pairs", "sources", type=click.Path(path_type=Path), multiple=True, required=True,
    help="A folder with pairs.jsonl, or a Parquet file; several are several tasks that count the same.",
)  # fmt: skip
@click.option(
    "--metrics", default="map@10,recall@1,recall@10,mrr@10", show_default=True,
    help="Of map@k, recall@k, hit@k, mrr@k, accuracy, macro-f1, with commas.",
)  # fmt: skip
@click.option("--by", type=click.Choice(["category", "subcategory"]), help="Break every figure down by it.")
@click.option(
    "--classify", type=click.Choice(["prompt", "centroid", "heads"]), default="prompt", show_default=True,
    help="How a category is told: by its text, by the mean of its other images, or by a teacher's head.",
)  # fmt: skip
@click.option(
    "--prompt", default="{}", show_default=True, help="What is asked of a category; {} is its name."
)
@click.option("--direction", type=click.Choice(["text-to-image", "image-to-text"]), default="text-to-image",
              show_default=True, help="What is asked for by what.")  # fmt: skip
@click.option("--variant", help="Which variant; by default what finalize chose.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 256), help="Threads.")
@click.option("--calls", default=100, show_default=True, type=click.IntRange(min=20), help="Calls to time.")
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(min=0), help="Bootstrap.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the bootstrap.")
@click.option("--skip-bad", is_flag=True, help="Leave out pairs whose image or caption is unusable.")
@trust_options
@json_option
@click.pass_obj
def command(
    app: App,
    bundle: Path,
    sources: tuple[Path, ...],
    metrics: str,
    by: str | None,
    classify: Any,
    prompt: str,
    direction: Any,
    variant: str | None,
    threads: int,
    calls: int,
    resamples: int,
    seed: int,
    skip_bad: bool,
) -> int:
    """Judge BUNDLE on pairs, with the very files and preprocessing that a device uses.

    BUNDLE may also be the folder that `edgeglm adapt` wrote: then the teacher is judged, with --classify
    heads by the classifiers that teacher.multitask gave it. Exits with 3 where a check fails: embeddings
    that are not of length one, or images of which training and deployment make different things.
    """
    import msgspec

    from edgeglm.data.records import BadRecords
    from edgeglm.evaluate.evaluator import evaluated
    from edgeglm.evaluate.measures import measures_of
    from edgeglm.runtime.evaluation import embedded, latencies, peak_bytes, retrieval_task

    wanted = measures_of(metrics)
    if classify == "prompt" and "{}" not in prompt:
        raise UserError(f"the prompt {prompt!r} names no category; write {{}} where its name is to stand")
    names = [source.resolve().name for source in sources]
    if len(set(names)) < len(names):
        raise UserError("two of the pairs are called the same; rename one")
    told = by or "category"
    bad = BadRecords(skip=skip_bad)
    read = {name: items_of(source, told, bad) for name, source in zip(names, sources, strict=True)}
    if skipped := dict(sorted(bad.counts.items())):
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        app.note(f"{sum(skipped.values())} pairs left out: {reasons}")
    with ExitStack() as stack:
        judged = _opened(stack, app, bundle, variant, threads)
        with app.progress.task("Evaluate", total=len(read)) as task:
            found = []
            for name, items in read.items():
                found.append(embedded(judged.embedder, name, items))
                task.advance()
        classes = [judged.classified(one, classify, prompt, told) for one in found]
        figures = evaluated(
            [retrieval_task(one, direction) for one in found],
            [one for one in classes if one is not None],
            wanted,
            resamples=resamples,
            seed=seed,
        )
        checks = judged.checks(found)
        times = latencies(found[0], judged.embedder, calls)
        memory = {"model_bytes": judged.model_bytes, "peak_resident_bytes": peak_bytes()}
    _print(app, figures, checks, times, memory, by, judged.words)
    app.emit(
        {
            "bundle": bundle,
            "variant": judged.variant,
            "through": judged.words,
            "direction": direction,
            "classifier": classify,
            "skipped_pairs": skipped,
            "tasks": {one.name: {"images": len(one.items), "texts": len(one.texts)} for one in found},
            "figures": [
                figure if by else {key: value for key, value in figure.items() if key not in _BY_CATEGORY}
                for figure in msgspec.to_builtins(figures)
            ],
            "checks": msgspec.to_builtins(checks),
            "latency": msgspec.to_builtins(times),
            "memory": memory,
        }
    )
    return 0 if checks.passed else 3


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What is judged: a bundle with its retriever, or a teacher."""

    embedder: Embedder
    variant: str | None
    words: str
    model_bytes: int
    bundle: tuple[Bundle, Retriever] | None = None
    teacher: TeacherTowers | None = None

    def classified(self, found: Embedded, classify: Any, prompt: str, task: str) -> ClassificationTask | None:
        """Tell the categories in the way that is asked for. Raises UserError for heads of a bundle."""
        from edgeglm.runtime.evaluation import classification_task, headed_task

        if classify != "heads":
            return classification_task(found, self.embedder, classify, prompt)
        if self.teacher is None:
            raise UserError(
                "a bundle's student has no classifiers; give the folder that edgeglm adapt wrote, or "
                "--classify prompt or centroid"
            )
        return headed_task(found, self.teacher, task)

    def checks(self, found: list[Embedded]) -> Checks | LengthChecks:
        """Compare training with deployment; a teacher is not deployed, so that only lengths are checked."""
        from edgeglm.runtime.evaluation import LengthChecks, checks_of

        if self.bundle is None:
            return LengthChecks.of(found)
        opened, retriever = self.bundle
        return checks_of(found, retriever, opened.preprocessing.image, side=training_side(opened))


def _opened(stack: ExitStack, app: App, bundle: Path, variant: str | None, threads: int) -> _Judged:
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.evaluate.teacher_towers import TeacherTowers, is_teacher
    from edgeglm.runtime.finalized import choice_here
    from edgeglm.runtime.retrieval import Retriever

    if is_teacher(bundle):
        if variant is not None:
            raise UserError(f"{bundle} is a teacher, which has no variants; leave --variant out")
        teacher = stack.enter_context(TeacherTowers(bundle, threads=threads))
        size = teacher.model_bytes()
        return _Judged(
            embedder=teacher, variant=None, words="ONNX Runtime", model_bytes=size, teacher=teacher
        )
    opened = stack.enter_context(open_bundle(bundle, trust=app.trust()))
    choice = choice_here(opened, variant)
    retriever = stack.enter_context(
        Retriever(opened, variant=choice.variant, threads=threads, engine=choice.engine)
    )
    files = [opened.model(choice.variant, tower) for tower in ("image", "text")]
    return _Judged(
        embedder=retriever,
        variant=choice.variant,
        words=choice.words,
        model_bytes=sum(path.stat().st_size for path in files),
        bundle=(opened, retriever),
    )


_BY_CATEGORY = ("categories", "counts")


def items_of(source: Path, by: str, bad: BadRecords) -> tuple[Item, ...]:
    """Read pairs as a build does, an image once with all its texts. Raises UserError.

    Texts that differ in case, hyphens or encoding alone are one, written as the first of them is. Where bad
    pairs are left out, so are those whose picture cannot be decoded.
    """
    from edgeglm.data.languages import folded
    from edgeglm.data.records import records_of, source_file
    from edgeglm.data.transforms import decoded_image
    from edgeglm.runtime.evaluation import Item

    kind = "parquet" if source.suffix == ".parquet" else "folder"
    images: dict[str | bytes, Item] = {}
    written: dict[str, str] = {}
    undecoded: set[str | bytes] = set()
    for record in records_of(source_file(source, kind), bad):
        key = record.image if isinstance(record.image, bytes) else record.name
        before = images.get(key)
        if bad.skip and before is None and key not in undecoded:
            try:
                decoded_image(record.image)
            except UserError as error:
                undecoded.add(key)
                bad.add("corrupt image", f"{record.where}: {error}")
        if key in undecoded:
            continue
        text = record.text
        texts = () if text is None else (written.setdefault(folded(text), text),)
        category = record.subcategory if by == "subcategory" else record.category
        if before is not None:
            texts = tuple(dict.fromkeys((*before.texts, *texts)))
            category = before.category or category
        images[key] = Item(image=record.image, texts=texts, category=category)
    return tuple(images.values())


def training_side(bundle: Bundle) -> int:
    """Return the side of the pixels that the bundle's training kept; the model's own without a recipe."""
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    own = bundle.preprocessing.image.resolution
    if "recipe.toml" not in bundle.manifest.files:
        return own
    recipe = tomllib.loads(bundle.file("recipe.toml").read_text("utf-8"))
    return int(recipe.get("data", {}).get("image_size", own))


def _print(
    app: App,
    figures: tuple[Figure, ...],
    checks: Checks | LengthChecks,
    times: dict[str, Percentiles],
    memory: dict[str, int],
    by: str | None,
    through: str,
) -> None:
    from edgeglm.runtime.evaluation import LengthChecks

    def cell(interval: Any) -> str:
        return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"

    tasks = list(dict.fromkeys(name for figure in figures for name in figure.tasks))
    heads = [f">{name}" for name in tasks] if len(tasks) > 1 else []
    rows = [
        (
            figure.metric,
            cell(figure.all),
            *(cell(figure.tasks[name]) if name in figure.tasks else "-" for name in tasks if heads),
        )
        for figure in figures
    ]
    title = "mean over tasks, each counting the same" if heads else "with 95 % bootstrap intervals"
    app.table(("metric", ">all", *heads), rows, title=title)
    if by:
        for figure in figures:
            app.table(
                (by, ">count", f">{figure.metric}"),
                [(one, figure.counts[one], cell(value)) for one, value in figure.categories.items()],
                title="share of each that is told rightly" if "@" not in figure.metric else "",
            )
    app.table(
        ("one call", ">p50 ms", ">p90 ms", ">p99 ms"),
        [(name, f"{t.p50_ms:.2f}", f"{t.p90_ms:.2f}", f"{t.p99_ms:.2f}") for name, t in times.items()],
        title=f"preparation included, {times['text'].calls} calls, {through}",
    )
    app.print(
        f"memory: models {human_bytes(memory['model_bytes'])}, this process at most "
        f"{human_bytes(memory['peak_resident_bytes'])}"
    )
    outcome = f"checks {'passed' if checks.passed else 'FAILED'}: "
    lengths = f"lengths differ from 1 by {checks.largest_deviation:.1e} at most"
    if isinstance(checks, LengthChecks):
        app.print(outcome + lengths)
        return
    app.print(
        f"{outcome}{checks.same_tensor} of {checks.images} images "
        f"give training (kept at {checks.side} pixels) and deployment the same tensor, largest "
        f"difference {checks.largest_difference:.3f}, least cosine of the embeddings "
        f"{checks.least_cosine:.4f}; {lengths}"
    )
