"""asyncssh, imported without what edgeglm never asks of it: a rollback waits for this first of all."""

from __future__ import annotations

import sys
from typing import Any

from edgeglm.core.errors import UserError

# asyncssh does without these itself where they cannot be imported: X.509 certificates, which OpenSSH does not
# know, and a MAC that is asked for only beside ciphers older than all that both sides have.
_LEFT_OUT = ("asyncssh.crypto.x509", "asyncssh.crypto.umac")


def asyncssh_module() -> Any:
    """Return asyncssh. Raises UserError where it is not installed."""
    if "asyncssh" in sys.modules:
        return sys.modules["asyncssh"]
    import ctypes.util

    # As it is, it starts a compiler and ldconfig to look for a library of ciphers that cryptography has, too.
    former, ctypes.util.find_library = ctypes.util.find_library, _library_there
    hidden = [name for name in _LEFT_OUT if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: an import raises ImportError
    try:
        import asyncssh
    except ImportError as error:
        raise UserError("deploying needs asyncssh; pip install 'edgeglm[deploy]'") from error
    finally:
        ctypes.util.find_library = former
        for name in hidden:
            sys.modules.pop(name, None)
    return asyncssh


def _library_there(name: str) -> str | None:
    """Find a library as ``ctypes.util.find_library`` does, by loading it and by nothing else."""
    import ctypes

    file = f"lib{name}.so"
    try:
        ctypes.CDLL(file)
    except OSError:
        return None
    return file
