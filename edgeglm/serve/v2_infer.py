"""The way of an inference request over HTTP."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Coroutine, Mapping, MutableMapping
from functools import lru_cache
from typing import Any

from edgeglm.core.errors import UserError
from edgeglm.serve.guard import Receive, Send, answered_by, send_answer, whole_body
from edgeglm.serve.identity import Identity
from edgeglm.serve.models import answers
from edgeglm.serve.refusals import NotFoundError, TooLargeError, UnknownEncodingError
from edgeglm.serve.service import Service
from edgeglm.serve.v2_messages import check_wanted, deadline_of, infer_answer, infer_request, priority_of

Inferred = tuple[bytes, list[tuple[bytes, bytes]], Identity]
_HEADER = b"inference-header-content-length"
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_WORTH_COMPRESSING = 1024  # bytes
_NO_WEIGHT = re.compile(rb"q\s*=\s*0(\.0*)?")


class InferRoute:
    """``POST /v2/models/{name}[/versions/{version}]/infer``, as plain ASGI."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request. Raises what the guard turns into an answer."""
        self._service.model(*model_in(scope["path"]))  # before a long body is waited for
        body = await whole_body(receive)
        answer, headers, identity = await inferred(self._service, scope["path"], dict(scope["headers"]), body)
        answered_by(scope, identity)
        await send_answer(send, 200, answer, headers)


def inferred(
    service: Service, path: str, headers: Mapping[bytes, bytes], body: bytes
) -> Coroutine[Any, Any, Inferred]:
    """Answer a whole request. To be awaited, as ``async`` functions are.

    Args:
        service: The bundle in service.
        path: What was asked for.
        headers: The request's, names in lower case.
        body: Its body, as it came.

    Returns:
        The answer's body and headers, apart from those that every answer has, and which bundle it is of.

    Raises:
        EdgeglmError: Whatever is wrong with it, or happens to it.
    """
    encoding = headers.get(b"content-encoding")
    if encoding is None:
        return _inferred(service, path, headers, body)
    return _inflated(service, path, headers, body, encoding)


async def _inflated(
    service: Service, path: str, headers: Mapping[bytes, bytes], body: bytes, encoding: bytes
) -> Inferred:
    service.model(*model_in(path))  # before anything is inflated
    plain = plain_body(body, encoding, service.config.max_body)
    service.budget.reserve(len(plain))
    try:
        return await _inferred(service, path, headers, plain)
    finally:
        service.budget.release(len(plain))


async def _inferred(service: Service, path: str, headers: Mapping[bytes, bytes], body: bytes) -> Inferred:
    model = service.model(*model_in(path))
    length = headers.get(_HEADER)
    request, arrays = infer_request(body, None if length is None else _length(length))
    check_wanted(request, model)
    served = service.served
    outputs = await answers(
        served.runner,
        model,
        arrays,
        max_rows=service.config.max_rows,
        deadline=deadline_of(request.parameters),
        priority=priority_of(request.parameters),
    )
    answer, json_length = infer_answer(request, model, served.identity.digest, outputs)
    given = [_JSON] if json_length is None else [_BINARY, (_HEADER, b"%d" % json_length)]
    accepted = headers.get(b"accept-encoding")
    if accepted is not None and len(answer) > _WORTH_COMPRESSING:
        answer = compressed(answer, accepted, given)
    return answer, given, served.identity


def model_in(path: str) -> tuple[str, str]:
    """Return the model and version that a path names. Raises NotFoundError for another form."""
    return _model_in(path) if len(path) < 200 else _model_in.__wrapped__(path)


@lru_cache(maxsize=256)
def _model_in(path: str) -> tuple[str, str]:
    parts = path.split("/")
    if len(parts) == 5:
        return parts[3], ""
    if len(parts) == 7 and parts[4] == "versions":
        return parts[3], parts[5]
    raise NotFoundError("there is nothing at this path; see /openapi.json")


def plain_body(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Decompress a body.

    Raises TooLargeError before it grows over ``limit``, UnknownEncodingError, and UserError for damage.
    """
    encoding = encoding.strip().lower()
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise UnknownEncodingError("the body is compressed in a way not known here; use gzip or deflate")
    inflater = zlib.decompressobj(wbits=31 if encoding == b"gzip" else 15)
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise UserError(f"the body is no {encoding.decode()}; send it whole, or not compressed") from None
    if len(plain) > limit:
        raise TooLargeError(f"the body grows over the limit of {limit} bytes; send less at a time")
    if not inflater.eof:
        raise UserError("the compressed body is cut off; send it whole")
    return plain


def compressed(answer: bytes, accepted: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Compress an answer for a caller that asks for it, and say so in ``headers``."""
    ways = {way for way in (b"gzip", b"deflate") if _accepts(accepted, way)}
    if b"gzip" in ways:
        headers.append((b"content-encoding", b"gzip"))
        return gzip.compress(answer, 1)
    if b"deflate" in ways:
        headers.append((b"content-encoding", b"deflate"))
        return zlib.compress(answer, 1)
    return answer


def _accepts(accepted: bytes, way: bytes) -> bool:
    """Say whether an ``Accept-Encoding`` names a way, and not with a weight of 0."""
    for entry in accepted.lower().split(b","):
        name, *parameters = (part.strip() for part in entry.split(b";"))
        if name == way:
            return not any(_NO_WEIGHT.fullmatch(parameter) for parameter in parameters)
    return False


def _length(value: bytes) -> int:
    if not value.isdigit() or len(value) > 15:
        raise UserError("Inference-Header-Content-Length is no number; send the length of the JSON")
    return int(value)
