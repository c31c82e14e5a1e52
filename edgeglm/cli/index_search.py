"""`edgeglm index search`: an index asked with words or with a picture."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from edgeglm.cli.console import App, json_option, trust_options

_PATH = click.Path(path_type=Path)


@click.command(name="search")
@click.argument("index", type=_PATH)
@click.argument("bundle", type=_PATH)
@click.option("--query", metavar="TEXT", help="Words to search with.")
@click.option("--image", type=_PATH, help="A picture to search with, in place of words.")
@click.option("-k", "count", default=10, show_default=True, type=click.IntRange(min=1), help="Results.")
@click.option(
    "--where", multiple=True, metavar="FIELD=VALUE", help="Filter: =, !=, <, <=, >, >=. Repeatable."
)
@click.option("--precision", type=click.Choice(["int8", "binary", "exact"]), help="What is scanned.")
@click.option("--variant", help="Which variant embeds; by default what finalize chose.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256), help="Threads.")
@trust_options
@json_option
@click.pass_obj
def search(
    app: App,
    index: Path,
    bundle: Path,
    query: str | None,
    image: Path | None,
    count: int,
    where: tuple[str, ...],
    precision: str | None,
    variant: str | None,
    threads: int,
) -> None:
    """Search INDEX with words or with a picture, embedded by BUNDLE."""
    if (query is None) == (image is None):
        raise click.UsageError("give either --query TEXT or --image FILE")

    from edgeglm.bundle.verify import open_bundle
    from edgeglm.index.filters import where_from_words
    from edgeglm.index.space import require_index_space
    from edgeglm.index.vector_index import VectorIndex
    from edgeglm.runtime.finalized import choice_here
    from edgeglm.runtime.retrieval import Retriever

    with ExitStack() as stack:
        opened = stack.enter_context(open_bundle(bundle, trust=app.trust()))
        choice = choice_here(opened, variant)
        found = stack.enter_context(VectorIndex(index))
        require_index_space(found.header, opened, choice.variant, index)
        retriever = stack.enter_context(
            Retriever(opened, variant=choice.variant, threads=threads, engine=choice.engine)
        )
        if image is not None:
            vector = retriever.embed_images([image])
        else:
            assert query is not None
            vector = retriever.embed_text([query])
        (matches,) = found.search(
            vector, count, where=where_from_words(where) if where else None, precision=precision
        )
        scanned = precision or found.header.precision
        rows = len(found)
    hits = [
        {"rank": rank, "score": round(match.score, 6), "id": match.id, "metadata": match.metadata}
        for rank, match in enumerate(matches, start=1)
    ]
    app.table(
        [">rank", ">score", "id", "text"],
        [
            (hit["rank"], f"{match.score:.4f}", match.id, match.metadata.get("text", ""))
            for hit, match in zip(hits, matches, strict=True)
        ],
    )
    app.print(f"{rows} rows, {scanned}; variant {choice.variant} of {bundle}, {choice.words}")
    app.emit(
        {
            "query": query,
            "image": image,
            "index": index,
            "rows": rows,
            "precision": scanned,
            "bundle": bundle,
            "variant": choice.variant,
            "through": choice.words,
            "hits": hits,
        }
    )
