"""What a device says of the engines it built, brought home: kept per board and library version."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.core.digest import sha256_json
from edgeglm.core.errors import UserError
from edgeglm.core.store import Store
from edgeglm.deploy.connection import Device

KIND = "device-build"
_PATTERNS = (
    "bundle.finalized/receipt.json",
    "bundle.finalized/engines/*/engine.json",
    "bundle.finalized/engines/*/build.log",
    "bundle.finalized/engines/*/layers.json",
    "bundle.finalized/engines/*/timing.cache",
)
_ASKED_FOR = re.compile(
    r"bundle\.finalized/(receipt\.json|engines/[0-9A-Za-z_-]+/(engine\.json|build\.log|layers\.json|timing\.cache))"
)
_LIMIT_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The files of one finalize on one board, by their names below ``bundle.finalized/``."""

    device: str
    receipt: Mapping[str, Any]
    files: Mapping[str, bytes]

    @property
    def place(self) -> dict[str, Any]:
        """What makes it comparable: this kind of board with this version of the library."""
        board = self.receipt["board"]
        identity = {name: board.get(name) for name in ("model", "machine", "sm", "gpu", "l4t")}
        return {"board": identity, "library": [self.receipt["library"], self.receipt["library_version"]]}


async def evidence_from(device: Device, slot: str, name: str, receipt: Mapping[str, Any]) -> Evidence:
    """Fetch receipt, layer tables, logs and timing caches of a slot.

    Raises UserError for a name that was not asked for: what a device says is never a path here.
    """
    answer = await device.ask("read", slot=slot, patterns=_PATTERNS, limit=_LIMIT_BYTES)
    prefix = "bundle.finalized/"
    for path in answer["files"]:
        if not _ASKED_FOR.fullmatch(path):
            raise UserError(f"{name} sent a file {path!r} that nobody asked for; do not trust that device")
    files = {path.removeprefix(prefix): base64.b64decode(data) for path, data in answer["files"].items()}
    return Evidence(device=name, receipt=receipt, files=files)


def kept_evidence(evidence: Evidence, store: Store) -> Path:
    """Put evidence into the store, under its board, library version and bundle; return the folder."""
    digests = {"content": evidence.receipt["content_digest"], "created": evidence.receipt["created"]}
    key = sha256_json({"stage": KIND, **evidence.place, **digests})

    def write(folder: Path) -> dict[str, Any]:
        for name, data in evidence.files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        (folder / "place.json").write_bytes(msgspec.json.encode(evidence.place))
        return {"key": evidence.place, "device": evidence.device, "measured": {}}

    artifact, _ = store.put(key, KIND, write)
    return artifact.path
