"""Ten thousand mutated bundles and manifests: none crashes, writes elsewhere, or passes as the maker's."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from edgeglm.bundle.archive import archive_from_folder
from edgeglm.bundle.manifest import MANIFEST_NAME, SIGNATURES_NAME, manifest_from_bytes
from edgeglm.bundle.sign import sign_bundle
from edgeglm.bundle.signing import make_key, public_key_from_file
from edgeglm.bundle.trust import Trust
from edgeglm.bundle.verify import open_bundle
from edgeglm.core.digest import sha256_listing
from edgeglm.core.errors import UserError

pytest.importorskip("cryptography")

MANIFESTS, ARCHIVES, FORGERIES = 4000, 3000, 3000
HOSTILE = (
    "../outside", "/outside", "a/../../outside", "models/../../../outside", "..", ".", "", "a//b", "con",
    "a\\..\\outside", "C:outside", "x" * 300, "a/\u202egnp", "manifest.json", "MANIFEST.JSON",
    "signatures.json", "models/fp32/image.onnx/x", "recipe.toml ", "e\u0301", "\ud800", "nul.txt",
)  # fmt: skip
ODD: tuple[Any, ...] = (None, -1, 2**70, 1.5, float("nan"), "", "x", [], {}, True, [[]], {"": 0}, "0" * 64)


def mutated(value: Any, draw: random.Random) -> Any:
    """Change one place of a JSON tree: another type, another name, gone, twice, nested."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(5)
        changed = dict(value)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[draw.choice(HOSTILE)] = changed.pop(key)
        else:
            changed[key] = mutated(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return [*value, value[place]]
        return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.5:
        place = draw.randrange(len(value))
        return value[:place] + draw.choice("\0/\\.\u00e9\U0001f600a0") + value[place + 1 :]
    return draw.choice((*ODD, *HOSTILE))


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, drop, repeat or insert a few bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        if not changed:
            break
        place = draw.randrange(len(changed))
        kind = draw.randrange(5)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            del changed[place : place + draw.randrange(1, 64)]
        elif kind == 3:
            changed[place:place] = changed[place : place + draw.randrange(1, 64)]
        else:
            changed[place:place] = draw.randbytes(draw.randrange(1, 16))
    return bytes(changed)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "keys", "maker")[0]


@pytest.fixture
def trust(key: Path) -> Trust:
    return Trust(keys=(public_key_from_file(key.with_suffix(".pub")),))


@pytest.fixture
def signed(packed: Path, key: Path) -> Path:
    sign_bundle(packed, [key])
    return packed


@pytest.fixture
def sandbox(tmp_path: Path) -> Callable[[], Path]:
    """Return a fresh folder to extract into; nothing beside it may change."""
    room = tmp_path / "room"
    room.mkdir()
    (room / "outside").write_bytes(b"untouched")

    def fresh() -> Path:
        names = {path.name for path in room.iterdir()}
        assert names <= {"outside", "in"}, f"something was written beside the bundle: {names}"
        assert (room / "outside").read_bytes() == b"untouched"
        shutil.rmtree(room / "in", ignore_errors=True)
        return room / "in"

    return fresh


@pytest.mark.slow
def test_no_mutated_manifest_crashes_or_passes_as_the_makers(signed: Path, trust: Trust):
    draw = random.Random(1)
    good = (signed / MANIFEST_NAME).read_bytes()
    tree = json.loads(good)
    refused = 0
    for number in range(MANIFESTS):
        if number % 2:
            changed = flipped(good, draw)
        else:
            changed = json.dumps(mutated(tree, draw), indent=1).encode("utf-8", "surrogatepass")
        if changed == good:
            continue
        try:  # whoever would parse it unsigned gets a manifest or a sentence
            manifest_from_bytes(changed, "fuzzed")
        except UserError:
            refused += 1
        (signed / MANIFEST_NAME).write_bytes(changed)
        with pytest.raises(UserError):
            open_bundle(signed, trust=trust)
    assert refused > MANIFESTS // 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "tar.zst"])
def test_no_mutated_archive_crashes_or_writes_elsewhere(
    kind: Any, signed: Path, trust: Trust, sandbox: Callable[[], Path]
):
    draw = random.Random(2)
    archive = signed.with_name(f"demo.{kind}")
    with open_bundle(signed, trust=trust) as bundle:
        archive_from_folder(signed, bundle.manifest.files, archive, kind)
        digest, files = bundle.manifest.content_digest, bundle.manifest.files
    good = archive.read_bytes()
    for _ in range(ARCHIVES // 2):
        archive.write_bytes(flipped(good, draw))
        target = sandbox()
        try:
            opened = open_bundle(archive, trust=trust, extract_to=target)
        except UserError:
            assert not target.exists(), "a refused bundle leaves nothing"
            continue
        # bytes that mean nothing, such as a date in a zip header, may differ
        assert (opened.manifest.content_digest, opened.manifest.files) == (digest, files)
    sandbox()


@pytest.mark.slow
def test_no_forged_archive_writes_elsewhere_or_passes_as_the_makers(
    signed: Path, trust: Trust, sandbox: Callable[[], Path], tmp_path: Path
):
    draw = random.Random(3)
    tree = json.loads((signed / MANIFEST_NAME).read_bytes())
    content = {name: (signed / name).read_bytes() for name in tree["files"]}
    signatures = (signed / SIGNATURES_NAME).read_bytes()
    accepted = 0
    for number in range(FORGERIES):
        names = dict(content)
        for _ in range(draw.randrange(1, 3)):
            old = draw.choice(sorted(names))
            names[draw.choice(HOSTILE) if draw.random() < 0.8 else f"gallery/{number}"] = names.pop(old)
        archive = _forged(tmp_path / "forged", tree, names, signatures if number % 2 else None, draw)
        try:
            open_bundle(archive, trust=Trust(allow_unsigned=True), extract_to=sandbox()).close()
            accepted += 1
        except UserError:
            pass
        with pytest.raises(UserError):
            open_bundle(archive, trust=trust, extract_to=sandbox())
    sandbox()
    assert accepted > 0, "some are whole bundles, only not the maker's"


def _forged(
    path: Path, tree: dict[str, Any], names: dict[str, bytes], signatures: bytes | None, draw: random.Random
) -> Path:
    """Write an archive whose manifest fits its content: everything is right but the names and the maker."""
    files: dict[str, dict[str, Any]] = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in names.items()
    }
    decisive = ("models/", "tokenizer/", "golden/")
    single = {"preprocessing.json", "calibration.json", "precision_plan.json", "recipe.toml", "target.toml",
              "gallery/items.jsonl"}  # fmt: skip
    try:
        digest = sha256_listing(
            {
                name: record["sha256"]
                for name, record in files.items()
                if name.startswith(decisive)
                or name in single
                or (name.startswith("gallery/embeddings-") and name.endswith(".npy"))
            }
        )
    except UnicodeEncodeError:
        digest = "0" * 64
    forged = {**tree, "files": files, "content_digest": digest, "space": {}}
    if draw.random() < 0.7:  # else the variants name files that are gone
        forged["variants"] = [
            {**v, "files": {t: n for t, n in v["files"].items() if n in names}} for v in tree["variants"]
        ]
    members = [(MANIFEST_NAME, json.dumps(forged).encode("utf-8", "surrogatepass"))]
    if signatures is not None:
        members.append((SIGNATURES_NAME, signatures))
    members += sorted(names.items())
    if draw.random() < 0.5:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                entry = zipfile.ZipInfo("a")
                entry.filename = name.encode("utf-8", "replace").decode()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a name that comes twice is one of the forgeries
                    archive.writestr(entry, data)
        return path
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT, errors="surrogateescape") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name.encode("utf-8", "replace").decode()[:90] or "empty")
            header.size = len(data)
            if draw.random() < 0.05:
                header.type, header.linkname = tarfile.SYMTYPE, "../outside"
            tar.addfile(header, io.BytesIO(data))
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(buffer.getvalue()))
    return path
