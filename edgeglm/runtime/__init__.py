"""Running a bundle on this machine.

What callers of the runner need is imported from its file on first use; the types are in the stub beside this
file.
"""

import importlib
from typing import Any

_HOMES = {
    "Runner": "runner",
    "SyncRunner": "sync",
    "RunnerConfig": "config",
    "BatchPolicy": "batch_queue",
    "TowerSource": "contract",
    "Priority": "requests",
    "RequestError": "requests",
    "OverloadedError": "requests",
    "DeadlineExceededError": "requests",
    "EngineFailedError": "requests",
    "RunnerClosedError": "requests",
}


def __getattr__(name: str) -> Any:
    """Return what a caller of the runner needs."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
