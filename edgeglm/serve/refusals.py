"""Why a request is refused, and how each protocol says so."""

from __future__ import annotations

from dataclasses import dataclass

from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.runtime.requests import (
    DeadlineExceededError,
    EngineFailedError,
    OverloadedError,
    RunnerClosedError,
)


class NotFoundError(UserError):
    """There is no such model, version, bundle or picture."""


class TooLargeError(UserError):
    """A body or a batch is larger than the server takes."""


class UnknownEncodingError(UserError):
    """A body is compressed in a way that the server does not read."""

    known = b"gzip, deflate"


class CompressedError(UnknownEncodingError):
    """A body is compressed where none may be."""

    known = b"identity"


class ForbiddenError(UserError):
    """The server was not started in a way that allows this."""


class UnauthorizedError(UserError):
    """The bearer token is missing or wrong."""


class NotReadyError(EdgeglmError):
    """The model is known but out of service."""


class SlowCallerError(EdgeglmError):
    """A caller takes too long to send its body."""


class CrowdedError(EdgeglmError):
    """There are too many connections."""


class GoneError(EdgeglmError):
    """The caller hung up: nobody reads an answer."""


@dataclass(frozen=True)
class Refusal:
    """An HTTP status, a gRPC status by name, and whether to try again after some seconds."""

    status: int
    grpc: str
    retry_after: int | None = None


# The first class that fits counts, so the narrower ones come first.
_REFUSALS: tuple[tuple[type[BaseException], Refusal], ...] = (
    (NotFoundError, Refusal(404, "NOT_FOUND")),
    (TooLargeError, Refusal(413, "INVALID_ARGUMENT")),
    (UnknownEncodingError, Refusal(415, "INVALID_ARGUMENT")),
    (ForbiddenError, Refusal(403, "PERMISSION_DENIED")),
    (UnauthorizedError, Refusal(401, "UNAUTHENTICATED")),
    (UserError, Refusal(400, "INVALID_ARGUMENT")),
    (OverloadedError, Refusal(429, "RESOURCE_EXHAUSTED", retry_after=1)),
    (DeadlineExceededError, Refusal(504, "DEADLINE_EXCEEDED")),
    (RunnerClosedError, Refusal(503, "UNAVAILABLE", retry_after=5)),
    (NotReadyError, Refusal(503, "UNAVAILABLE")),
    (CrowdedError, Refusal(503, "UNAVAILABLE", retry_after=1)),
    (SlowCallerError, Refusal(408, "CANCELLED")),
    (GoneError, Refusal(499, "CANCELLED")),
    (EngineFailedError, Refusal(500, "INTERNAL")),
)


def refusal_of(error: BaseException) -> Refusal:
    """Return how an error is said; what nobody foresaw is 500."""
    return next((found for kind, found in _REFUSALS if isinstance(error, kind)), Refusal(500, "INTERNAL"))


def words_of(error: BaseException) -> str:
    """Return what a caller may read of an error: ours in full, of others no more than that there was one."""
    if isinstance(error, EdgeglmError):
        return str(error)
    return "the server failed on this request; its log has the reason under this request's id"
