"""Memory that does not suffice, told as what to lower."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgeglm.core.errors import EdgeglmError, UserError

#: How torch's allocator of a CPU and ONNX Runtime's say that there is no more: neither has a class for it.
_ALLOCATION_FAILED = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "Failed to allocate memory",
    "bad_alloc",
    "bad allocation",
)
#: How the loader says it: what then does not fit is a library, and no recipe makes one smaller.
_NOT_LOADED = ("failed to map segment", "cannot allocate memory", "cannot create shared object")


@contextmanager
def memory_advice(title: str, lower: str, *, kept: Callable[[], str] = str) -> Iterator[None]:
    """Turn a failed allocation within the body into a UserError.

    Args:
        title: What was being done.
        lower: What to lower, in the user's words.
        kept: Tells where a state is kept, if one is: a clause that begins with its own punctuation.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if any(map(_is_unloaded, _causes(error))):
            raise UserError(
                f"{title}: memory does not suffice to load the libraries{kept()}; give the process more"
            ) from error
        raise UserError(f"{title}: memory does not suffice{kept()}; lower {lower}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is an allocation that failed, in Python, numpy, torch, ONNX or ONNX Runtime.

    It may be what caused the error: exporters wrap whatever they meet. What is told already is no such error.
    """
    if isinstance(error, EdgeglmError):
        return False
    return any(_is_failed_allocation(one) or _is_unloaded(one) for one in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Go from an error to what caused it, and on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _is_failed_allocation(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    told = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return told and any(sign in str(error) for sign in _ALLOCATION_FAILED)


def _is_unloaded(error: BaseException) -> bool:
    return isinstance(error, ImportError | OSError) and any(sign in str(error) for sign in _NOT_LOADED)
