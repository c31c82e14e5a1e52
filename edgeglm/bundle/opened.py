"""A bundle that has been opened: where its parts are, and the small ones parsed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edgeglm.bundle.manifest import Manifest, VariantRecord
from edgeglm.bundle.paths import inside
from edgeglm.bundle.temporary import remove_temporary
from edgeglm.bundle.trust import SignatureState
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError, unknown_name

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeglm.bundle.preprocessing import Preprocessing

T = TypeVar("T")


class GalleryItem(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``gallery/items.jsonl``; ``thumbnail`` is a path within ``gallery/``."""

    id: str
    text: str
    thumbnail: str | None = None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What queries are compared with: row i of ``embeddings`` (float32 [N, D]) is ``items[i]``."""

    items: tuple[GalleryItem, ...]
    embeddings: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle. Use it as a context manager: an archive lives in a temporary folder till then.

    Attributes:
        path: The folder with the files.
        origin: What was opened, folder or archive.
        manifest: The parsed manifest.
        verified: Whether every byte was held against its digest.
        signature: What its signatures are worth on this machine.
    """

    path: Path
    origin: Path
    manifest: Manifest
    verified: bool
    signature: SignatureState
    temporary: Path | None = field(default=None, repr=False)

    def __enter__(self) -> Bundle:
        """Return the bundle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary folder of an extracted archive."""
        self.close()

    def close(self) -> None:
        """Remove the temporary folder of an extracted archive; a bundle folder is left alone."""
        if self.temporary is not None:
            remove_temporary(self.temporary)

    def variant(self, name: str | None = None) -> VariantRecord:
        """Return the record of a variant, the default one for None. Raises UserError if unknown."""
        wanted = name or self.manifest.default_variant
        known = {variant.name: variant for variant in self.manifest.variants}
        if wanted not in known:
            raise unknown_name("variant", wanted, known)
        return known[wanted]

    def model(self, variant: str | None, tower: str) -> Path:
        """Return the ONNX file of one tower of a variant. Raises UserError if there is none."""
        record = self.variant(variant)
        if tower not in record.files:
            raise unknown_name(f"tower of variant {record.name!r}", tower, record.files)
        return self.file(record.files[tower])

    def file(self, name: str) -> Path:
        """Return the path of a listed file. Raises UserError if the bundle has none of that name."""
        if name not in self.manifest.files:
            raise UserError(f"the bundle {self.origin} has no {name}; build it again with that part")
        return inside(self.path, name)

    def unchanged(self, name: str) -> Path:
        """Return the path of a listed file that is what the manifest says to this day.

        For whoever opens one long after the bundle was: a build puts another bundle under the same path.
        Raises UserError for a file that is gone, or another.
        """
        path = self.file(name)
        try:
            same = sha256_file(path) == self.manifest.files[name].sha256
        except FileNotFoundError:
            same = False
        except OSError as error:
            raise self.broken(name, error.strerror or error) from error
        if not same:
            raise UserError(
                f"{path} is gone or another since the bundle was opened; open the bundle that is there now"
            )
        return path

    def names(self, folder: str) -> list[str]:
        """List the files below a folder of the bundle, sorted."""
        return sorted(name for name in self.manifest.files if name.startswith(f"{folder}/"))

    @property
    def tokenizer_path(self) -> Path:
        """The ``tokenizers`` file."""
        return self.file("tokenizer/tokenizer.json")

    @property
    def preprocessing(self) -> Preprocessing:
        """How raw input becomes model input. Raises UserError when the file does not say."""
        from edgeglm.bundle.preprocessing import Preprocessing

        return self.parsed("preprocessing.json", Preprocessing)

    def parsed(self, name: str, kind: type[T]) -> T:
        """Read a listed JSON file as ``kind``. Raises UserError when it is something else."""
        try:
            return msgspec.json.decode(self.file(name).read_bytes(), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OSError) as error:
            raise self.broken(name, error) from error

    def gallery_items(self) -> tuple[GalleryItem, ...]:
        """Read the rows of the gallery. Raises UserError with the line that is wrong."""
        name = "gallery/items.jsonl"
        decoder = msgspec.json.Decoder(GalleryItem)
        items = []
        for number, line in enumerate(self.file(name).read_bytes().splitlines(), start=1):
            try:
                items.append(decoder.decode(line))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise self.broken(f"{name} line {number}", error) from error
        return tuple(items)

    def gallery(self, variant: str | None = None) -> Gallery:
        """Read the gallery that this very variant embedded; the embeddings stay on disk till used."""
        import numpy as np

        name = f"gallery/embeddings-{self.variant(variant).name}.npy"
        items = self.gallery_items()
        try:
            stored = np.load(self.file(name), mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, SyntaxError, MemoryError) as error:
            raise self.broken(name, error) from error
        if stored.ndim != 2 or stored.dtype not in (np.float32, np.float16) or len(stored) != len(items):
            raise self.broken(name, f"it is {stored.dtype} {list(stored.shape)} for {len(items)} items")
        return Gallery(items=items, embeddings=np.asarray(stored, dtype=np.float32))

    def thumbnail(self, item: GalleryItem) -> Path | None:
        """Return the picture of a gallery row, or None if the bundle carries none."""
        name = f"gallery/{item.thumbnail}"
        return self.file(name) if item.thumbnail is not None and name in self.manifest.files else None

    def broken(self, name: str, error: object) -> UserError:
        """Build the error for a listed file that cannot be used."""
        return UserError(f"the bundle {self.origin}: cannot read {name}: {error}; build the bundle again")
