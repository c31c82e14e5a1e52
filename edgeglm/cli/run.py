"""`edgeglm run`: retrieval from a bundle, on this machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options


@click.command(name="run")
@bundle_argument
@click.option("--query", metavar="TEXT", help="Words to search with.")
@click.option("--image", type=click.Path(path_type=Path), help="A picture to search with, in place of words.")
@click.option("-k", "count", default=10, show_default=True, type=click.IntRange(min=1), help="Results.")
@click.option("--variant", help="Which variant; by default what finalize chose.")
@click.option("--rerank", is_flag=True, help="Order the first results anew by the bundle's re-ranker.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256), help="Threads.")
@trust_options
@json_option
@click.pass_obj
def command(
    app: App,
    bundle: Path,
    query: str | None,
    image: Path | None,
    count: int,
    variant: str | None,
    rerank: bool,
    threads: int,
) -> None:
    """Search the gallery of BUNDLE with words or with a picture.

    Says which variant and which file answered: the report's figure for that variant was measured
    on that very file.
    """
    if (query is None) == (image is None):
        raise click.UsageError("give either --query TEXT or --image FILE")
    if rerank and query is None:
        raise click.UsageError("--rerank orders the results of words; give --query TEXT")

    from edgeglm.bundle.verify import open_bundle
    from edgeglm.runtime.finalized import choice_here
    from edgeglm.runtime.reranking import Reranker
    from edgeglm.runtime.retrieval import Retriever

    with ExitStack() as stack:
        opened = stack.enter_context(open_bundle(bundle, trust=app.trust()))
        choice = choice_here(opened, variant)
        retriever = stack.enter_context(
            Retriever(opened, variant=choice.variant, threads=threads, engine=choice.engine)
        )
        if image is not None:
            result = retriever.search_image(image, count)
        elif rerank:
            assert query is not None
            reranker = stack.enter_context(Reranker(opened, threads=threads))
            result = reranker.search_text(retriever, query, count)
        else:
            assert query is not None
            result = retriever.search_text(query, count)
        in_place = opened.temporary is None  # an archive's thumbnails go with its temporary folder
    hits = [
        {
            "rank": rank,
            "score": round(hit.score, 6),
            "text": hit.text,
            "id": hit.id,
            "thumbnail": str(hit.thumbnail) if in_place and hit.thumbnail is not None else None,
        }
        for rank, hit in enumerate(result.hits, start=1)
    ]
    rows = [
        (hit["rank"], f"{hit['score']:.4f}", hit["text"], hit["id"], hit["thumbnail"] or "") for hit in hits
    ]
    app.table([">rank", ">score", "text", "id", "thumbnail"], rows)
    app.print(f"variant {result.variant}, {result.model} of {bundle}, {choice.words}")
    app.emit(
        {
            "query": query,
            "image": image,
            "bundle": bundle,
            "variant": result.variant,
            "model": result.model,
            "through": choice.words,
            "hits": hits,
        }
    )
