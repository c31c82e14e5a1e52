"""Memory that does not suffice, told as what to lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgeglm.core.errors import UserError

#: How torch's allocator of a CPU and ONNX Runtime's say that there is no more: neither has a class for it.
_ALLOCATION_FAILED = (
    "DefaultCPUAllocator",
    "not enough memory",
    "can't allocate memory",
    "Failed to allocate memory",
    "bad_alloc",
    "bad allocation",
)


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
        raise UserError(f"{title}: memory does not suffice{kept()}; lower {lower}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is an allocation that failed, in Python, numpy, torch or ONNX Runtime."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    told = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
    return told and any(sign in str(error) for sign in _ALLOCATION_FAILED)
