"""Embeddings and search for those who have no tensors: words or pictures in, JSON out."""

from __future__ import annotations

import asyncio
import binascii
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote_to_bytes

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgeglm.core.errors import UserError
from edgeglm.runtime.retrieval import FloatRows
from edgeglm.serve.forms import form_of
from edgeglm.serve.guard import answered_by
from edgeglm.serve.json_answers import json_answer, parsed
from edgeglm.serve.models import checked_text, text_from_bytes
from edgeglm.serve.refusals import CompressedError, NotFoundError, TooLargeError
from edgeglm.serve.search import Found, Searcher, described
from edgeglm.serve.service import Service
from edgeglm.serve.together import all_of

MOST_RESULTS = 1000
MOST_INLINE = 100
_ON_THE_LOOP = 20_000  # rows whose scores are quicker made than handed to a thread

Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=3.6e6)]


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to embed: any of these, in the order text, texts, image, images. Pictures are files in base64."""

    text: str | None = None
    texts: list[str] = []
    image: str | None = None
    images: list[str] = []
    timeout_ms: Milliseconds | None = None


class SearchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to search with: a text, or a picture in base64, and a filter for an index with metadata.

    The filter is an object or, as on the command line, words: ``kind=png price<20``.
    The first ``inline`` hits come with their picture as a ``data:`` URL: a page that shows 24 of them asks
    once, and not 25 times.
    """

    text: str | None = None
    image: str | None = None
    k: Annotated[int, msgspec.Meta(ge=1, le=MOST_RESULTS)] = 10
    where: dict[str, Any] | str | None = None
    inline: Annotated[int, msgspec.Meta(ge=0, le=MOST_INLINE)] = 0
    timeout_ms: Milliseconds | None = None


def routes(service: Service) -> list[Route]:
    """Return the routes."""

    async def embed(request: Request) -> Response:
        asked, pictures = await _embed_request(request)
        began = time.perf_counter()
        served = service.served
        rows = await _embedded(service, asked, pictures)
        answered_by(request.scope, served.identity)
        return json_answer(
            {
                "embeddings": [row.tolist() for row in rows],
                "dimensions": len(rows[0]),
                "ms": _ms(began),
                "edgeglm": served.identity.facts,
            }
        )

    async def search(request: Request) -> Response:
        asked, picture = await _search_request(request)
        began = time.perf_counter()
        seconds = _seconds(asked.timeout_ms)
        service.model("embed_text" if picture is None else "embed_image")
        with service.served as served:  # what is searched is of the very bundle that embeds
            searcher = served.require_searcher()
            if picture is not None:
                query_D = await served.runner.embed_image(picture, deadline=seconds)
            else:
                assert asked.text is not None
                query_D = await served.runner.embed_text(checked_text(asked.text), deadline=seconds)
            embedded = time.perf_counter()
            found = await _searched(searcher, query_D, asked.k, _filter(asked.where))
            searched = time.perf_counter()
            data = await asyncio.to_thread(_inline, searcher, found[: asked.inline]) if asked.inline else {}
            rows = searcher.size
        answered_by(request.scope, served.identity)
        return json_answer(
            {
                "hits": [_hit(rank, hit, data.get(hit.id)) for rank, hit in enumerate(found, start=1)],
                "searched": described(searcher, rows),
                "ms": {
                    "embed": round((embedded - began) * 1e3, 3),
                    "search": round((searched - embedded) * 1e3, 3),
                    "all": _ms(began),
                },
                "edgeglm": served.identity.facts,
            }
        )

    async def picture(request: Request) -> Response:
        with service.served as served:
            picture = await asyncio.to_thread(served.require_searcher().picture, request.path_params["id"])
            data, kind = await asyncio.to_thread(_picture, picture)
        # what a browser would run must never come from a folder of pictures
        headers = {
            "x-content-type-options": "nosniff",
            "content-security-policy": "default-src 'none'; sandbox",
        }
        headers["cache-control"] = "private, max-age=60"
        return Response(data, media_type=f"image/{kind}", headers=headers)

    return [
        Route("/v1/embed", embed, methods=["POST"]),
        Route("/v1/search", search, methods=["GET", "POST"]),
        Route("/v1/pictures/{id:path}", picture),
    ]


async def _embed_request(request: Request) -> tuple[EmbedRequest, list[bytes]]:
    kind = _content_type(request)
    query = _query(request)
    if kind.startswith("image/"):
        if unknown := set(query) - {"timeout_ms"}:
            raise UserError(f"{min(unknown)[:40]!r} in the URL is not known; send 'timeout_ms' or nothing")
        return EmbedRequest(timeout_ms=_timeout(query)), [await request.body()]
    _check_no_query(query)
    if kind == "multipart/form-data":
        fields, pictures = await form_of(request)
        if unknown := set(fields) - {"text", "timeout_ms"}:
            raise UserError(
                f"form field {min(unknown)[:40]!r} is not known; send 'text', 'image', 'timeout_ms'"
            )
        texts = fields.get("text", [])
        return EmbedRequest(texts=texts, timeout_ms=_timeout(fields)), pictures
    asked = parsed(await request.body(), EmbedRequest, "request for embeddings")
    pictures = [picture_from_base64(text) for text in (asked.image, *asked.images) if text is not None]
    return asked, pictures


async def _embedded(service: Service, asked: EmbedRequest, pictures: list[bytes]) -> FloatRows:
    texts = [checked_text(text) for text in (asked.text, *asked.texts) if text is not None]
    count = len(texts) + len(pictures)
    if not count:
        raise UserError("there is nothing to embed; give a 'text' or an 'image'")
    if count > service.config.max_rows:
        raise TooLargeError(f"{count} inputs are over the limit of {service.config.max_rows}; send several")
    for name, wanted in (("embed_text", texts), ("embed_image", pictures)):
        if wanted:
            service.model(name)
    deadline, runner = _seconds(asked.timeout_ms), service.runner
    return np.stack(
        await all_of(
            [
                *(runner.embed_text(text, deadline=deadline) for text in texts),
                *(runner.embed_image(picture, deadline=deadline) for picture in pictures),
            ]
        )
    )


async def _search_request(request: Request) -> tuple[SearchRequest, bytes | None]:
    """Read a query from the URL, from JSON, from a form, or from a picture as the body."""
    kind = _content_type(request)
    query = _query(request)
    if request.method != "POST" or kind.startswith("image/"):
        asked = _from_strings(query)
        picture = await request.body() if request.method == "POST" else None
    elif kind == "multipart/form-data":
        _check_no_query(query)
        fields, pictures = await form_of(request)
        if len(pictures) > 1:
            raise UserError(f"a search takes one query, not {len(pictures)} images; send one at a time")
        asked = _from_strings(fields)
        picture = pictures[0] if pictures else None
    else:
        _check_no_query(query)
        asked = parsed(await request.body(), SearchRequest, "search")
        picture = None
    if picture is None and asked.image is not None:
        picture = picture_from_base64(asked.image)
    if (asked.text is None) == (picture is None):
        raise UserError("a search takes one query; give either 'text' or 'image'")
    return asked, picture


async def _searched(
    searcher: Searcher, query_D: FloatRows, count: int, where: Mapping[str, Any] | None
) -> list[Found]:
    if searcher.carried and searcher.size <= _ON_THE_LOOP:
        return list(searcher.search(query_D, count, where))
    return list(await asyncio.to_thread(searcher.search, query_D, count, where))


def _hit(rank: int, hit: Found, data: str | None) -> dict[str, Any]:
    inline = {} if data is None else {"data": data}
    return {
        "rank": rank,
        "score": round(hit.score, 6),
        "id": hit.id,
        "text": hit.text,
        "picture": f"/v1/pictures/{quote(hit.id)}" if hit.picture else None,
        "metadata": dict(hit.metadata),
        **inline,
    }


def _inline(searcher: Searcher, found: list[Found]) -> dict[str, str]:
    """Return the pictures of some hits as ``data:`` URLs, by id."""
    urls = {}
    for hit in found:
        if not hit.picture:
            continue
        try:
            data, kind = _picture(searcher.picture(hit.id))
        except NotFoundError:  # gone since: what was found is right all the same
            continue
        urls[hit.id] = f"data:image/{kind};base64,{b64encode(data).decode()}"
    return urls


def _picture(found: Path | bytes) -> tuple[bytes, str]:
    """Return the bytes of a searcher's picture and its kind as MIME has it."""
    if isinstance(found, bytes):
        return found, "webp"
    kind = found.suffix.lstrip(".").lower()
    return found.read_bytes(), "jpeg" if kind == "jpg" else kind


def picture_from_base64(text: str) -> bytes:
    """Decode a picture, also one from a ``data:`` URL. Raises UserError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError("an image is no base64; encode the bytes of the file") from None


def _from_strings(values: Mapping[str, list[str]]) -> SearchRequest:
    """Read a query whose values are all text. ``q`` is short for ``text``; filters in words add up."""
    named: dict[str, object] = {}
    for name, given in values.items():
        kept = "text" if name == "q" else name
        words = kept == "where" and not any(one.startswith("{") for one in given)
        if kept in named or (len(given) > 1 and not words):
            raise UserError(f"the query says {kept[:40]!r} more than once; give it once")
        named[kept] = " ".join(given)
    try:
        if str(named.get("where", "")).startswith("{"):
            named["where"] = msgspec.json.decode(str(named["where"]))
        return msgspec.convert(named, SearchRequest, strict=False)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UserError(f"the query is no search: {error}; see /openapi.json") from None


def _filter(where: dict[str, Any] | str | None) -> dict[str, Any] | None:
    if not isinstance(where, str):
        return where
    from edgeglm.index.filters import where_from_text

    return where_from_text(where)


def _query(request: Request) -> dict[str, list[str]]:
    """Return what the URL says, by name. Raises UserError for bytes that are no text, and a packed body."""
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise CompressedError("this path takes no compressed body; send it as it is")
    query: bytes = request.scope["query_string"]
    if b"%" in query:  # reading it would put other characters there
        text_from_bytes(unquote_to_bytes(query))
    found: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        found.setdefault(name, []).append(value)
    return found


def _check_no_query(query: Mapping[str, list[str]]) -> None:
    """Raise UserError for what a URL says beside a body that says everything."""
    if query:
        raise UserError(
            f"{min(query)[:40]!r} in the URL is not read beside such a body; put it into the body"
        )


def _timeout(fields: Mapping[str, list[str]]) -> float | None:
    given = fields.get("timeout_ms")
    try:
        return msgspec.convert(given[-1], Milliseconds, strict=False) if given else None
    except msgspec.MsgspecError as error:
        raise UserError(f"timeout_ms: {error}; give milliseconds") from None


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1e3, 3)
