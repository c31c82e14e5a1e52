"""JSON in and out of the routes that are no tensors."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.responses import Response

from edgeglm.core.errors import UserError

T = TypeVar("T")


def json_answer(value: object, *, status: int = 200) -> Response:
    """Return an answer in JSON."""
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def parsed(body: bytes, kind: type[T], what: str) -> T:
    """Read a body as ``kind``. Raises UserError that names the key."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the body is no {what}: {error}; see /openapi.json") from None
