"""`edgeglm index`: folders of pictures, embedded by a bundle and kept to be searched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgeglm.cli.console import App, json_option, trust_options
from edgeglm.cli.index_search import search

if TYPE_CHECKING:
    from edgeglm.index.opening import FolderSource
    from edgeglm.index.pictures import PictureCounts

F = TypeVar("F", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)
_VARIANT_HELP = "Which variant embeds; by default what finalize chose."


@click.group(name="index")
def command() -> None:
    """Make an index of pictures, keep it up to date, and search it.

    An index belongs to the embedding space of the bundle that made it; another bundle is refused. What a
    command reports as added or removed is on disk and survives a crash.
    """


def source_options(function: F) -> F:
    """Give a command the options that say which pictures to take."""
    for option in (
        click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256), help="Threads."),
        click.option("--skip-bad", is_flag=True, help="Leave out and count what is no readable picture."),
        click.option("--metadata", type=_PATH, help='JSON Lines: {"image": path in FOLDER, any fields}.'),
        click.option("--prefix", help="First part of the ids. [default: the folder's name]"),
        click.option("--variant", help=_VARIANT_HELP),
    ):
        function = option(function)
    return function


@command.command(name="build")
@click.argument("bundle", type=_PATH)
@click.argument("folder", type=_PATH)
@click.option("--output", type=_PATH, required=True, help="The index to make.")
@click.option(
    "--precision",
    type=click.Choice(["int8", "binary", "exact"]),
    default="int8",
    show_default=True,
    help="What searches scan unless told otherwise.",
)
@click.option(
    "--thumbnails",
    type=click.IntRange(0, 1024),
    default=192,
    show_default=True,
    help="Longest side in pixels of the pictures that are kept; 0 keeps none.",
)
@source_options
@trust_options
@json_option
@click.pass_obj
def build(
    app: App,
    bundle: Path,
    folder: Path,
    output: Path,
    precision: str,
    thumbnails: int,
    prefix: str | None,
    metadata: Path | None,
    skip_bad: bool,
    threads: int,
    variant: str | None,
) -> None:
    """Embed the pictures of FOLDER with BUNDLE into a new index.

    When it is interrupted, `edgeglm index add` goes on where it stopped.
    """
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.index.opening import built_index

    source = _source(folder, prefix, metadata, skip_bad, threads)
    with open_bundle(bundle, trust=app.trust()) as opened:
        counts = built_index(
            opened,
            source,
            output,
            app.progress,
            variant=variant,
            precision=precision,
            thumbnail_side=thumbnails,
        )
    _say(app, output, counts)


@command.command(name="add", short_help="Bring INDEX up to date with FOLDER, or one picture.")
@click.argument("index", type=_PATH)
@click.argument("bundle", type=_PATH)
@click.argument("folder", type=_PATH)
@click.option("--prune", is_flag=True, help="Also remove the rows under the prefix that FOLDER has not.")
@click.option("--allow-empty", is_flag=True, help="Let --prune remove all of them where FOLDER is empty.")
@source_options
@trust_options
@json_option
@click.pass_obj
def add(
    app: App,
    index: Path,
    bundle: Path,
    folder: Path,
    prune: bool,
    allow_empty: bool,
    prefix: str | None,
    metadata: Path | None,
    skip_bad: bool,
    threads: int,
    variant: str | None,
) -> None:
    """Bring INDEX up to date with FOLDER, or one picture; what has not changed is not embedded again."""
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.index.opening import added_to_index

    if allow_empty and not prune:
        raise click.UsageError("--allow-empty changes nothing by itself; give --prune too, or leave it out")
    source = _source(folder, prefix, metadata, skip_bad, threads, prune=prune, allow_empty=allow_empty)
    with open_bundle(bundle, trust=app.trust()) as opened:
        counts = added_to_index(opened, source, index, app.progress, variant=variant)
    _say(app, index, counts)


@command.command(name="remove", short_help="Remove rows from INDEX by id or by filter.")
@click.argument("index", type=_PATH)
@click.argument("ids", nargs=-1)
@click.option("--where", multiple=True, metavar="FIELD=VALUE", help="Remove what a filter takes.")
@json_option
@click.pass_obj
def remove(app: App, index: Path, ids: tuple[str, ...], where: tuple[str, ...]) -> None:
    """Remove rows from INDEX by their ids, or by a filter such as --where folder=shop/old."""
    if bool(ids) == bool(where):
        raise click.UsageError("give either IDS or --where FIELD=VALUE")
    from edgeglm.index.filters import where_from_words
    from edgeglm.index.writer import IndexWriter

    with IndexWriter(index) as writer:
        chosen = writer.matching(where_from_words(where)) if where else list(ids)
        count = writer.remove(chosen)
        left, unfolded = len(writer.contents.entries), writer.unfolded
    unknown = len(set(chosen)) - count
    app.print(f"removed {count} rows, {left} left" + (f"; {unknown} ids were not there" if unknown else ""))
    _say_unfolded(app, unfolded)
    app.emit({"index": index, "removed": count, "unknown": unknown, "rows": left, "unfolded": unfolded})


@command.command(name="check")
@click.argument("index", type=_PATH)
@json_option
@click.pass_obj
def check(app: App, index: Path) -> None:
    """Hash the files of INDEX, which opening it does not; what its log holds is checked by opening."""
    from edgeglm.core.errors import UserError
    from edgeglm.index.vector_index import VectorIndex

    with VectorIndex(index) as found:
        rows, damaged = len(found), found.check()
    app.emit({"index": index, "rows": rows, "damaged": damaged})
    if damaged:
        names = ", ".join(damaged)
        raise UserError(f"{index} is damaged: {names}; restore the index from a copy, or build it again")
    app.print(f"{index}: {rows} rows, as they were written")


command.add_command(search)


def _source(
    folder: Path,
    prefix: str | None,
    metadata: Path | None,
    skip_bad: bool,
    threads: int,
    *,
    prune: bool = False,
    allow_empty: bool = False,
) -> FolderSource:
    from edgeglm.index.opening import FolderSource
    from edgeglm.index.picture_files import metadata_from_jsonl

    return FolderSource(
        folder=folder,
        prefix=prefix,
        metadata=metadata_from_jsonl(metadata) if metadata is not None else None,
        skip_bad=skip_bad,
        prune=prune,
        allow_empty=allow_empty,
        threads=threads,
    )


def _say(app: App, index: Path, counts: PictureCounts) -> None:
    from edgeglm.index.vector_index import VectorIndex

    with VectorIndex(index) as found:
        rows = len(found)
    skipped = sum(counts.skipped.values())
    parts = [f"{counts.added} added"]
    for count, what in (
        (counts.replaced, "replaced"),
        (counts.unchanged, "unchanged"),
        (counts.removed, "removed"),
    ):
        if count:
            parts.append(f"{count} {what}")
    if skipped:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.skipped.items()))
        parts.append(f"{skipped} skipped ({why})")
    if counts.unmatched:
        parts.append(f"{counts.unmatched} lines of metadata without a picture")
    app.print(f"{index}: {rows} pictures; {', '.join(parts)}")
    for example in counts.examples:
        app.note(f"skipped {example}")
    _say_unfolded(app, counts.unfolded)
    app.emit(
        {
            "index": index,
            "rows": rows,
            "added": counts.added,
            "replaced": counts.replaced,
            "unchanged": counts.unchanged,
            "removed": counts.removed,
            "unmatched": counts.unmatched,
            "skipped": dict(counts.skipped),
            "examples": counts.examples,
            "unfolded": counts.unfolded,
        }
    )


def _say_unfolded(app: App, why: str) -> None:
    if why:
        app.note(f"all of it is kept, but the log could not be folded: {why}")
