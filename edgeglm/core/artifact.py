"""An artifact: an immutable directory of files with a digest, a kind and its provenance."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeglm.core.digest import sha256_file, sha256_listing


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished, read-only directory.

    Attributes:
        kind: What it holds, in one word of the project's vocabulary ("pairs", "teacher", ...).
        path: The directory with the files.
        files: ``{relative posix path: hex sha256}`` of every file below ``path``.
        provenance: JSON-like record of what made it: key parts, seconds, metrics.
    """

    kind: str
    path: Path
    files: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """One sha256 over the names and contents of all files; nothing else enters it."""
        return sha256_listing(self.files)

    def file(self, name: str) -> Path:
        """Return the path of one file, which must be listed."""
        if name not in self.files:
            raise KeyError(f"artifact of kind {self.kind!r} has no file {name!r}: {sorted(self.files)}")
        return self.path / name


def listing_of(directory: Path) -> dict[str, str]:
    """Hash every regular file below ``directory``. Symbolic links are refused with ValueError."""

    def fail(error: OSError) -> None:
        raise error

    files: dict[str, str] = {}
    for folder, folders, names in os.walk(directory, onerror=fail):
        for name in (*folders, *names):
            if (Path(folder) / name).is_symlink():
                raise ValueError(f"{Path(folder) / name} is a symbolic link; artifacts hold plain files")
        for name in names:
            path = Path(folder) / name
            files[path.relative_to(directory).as_posix()] = sha256_file(path)
    return dict(sorted(files.items()))
