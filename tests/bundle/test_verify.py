from __future__ import annotations

import io
import json
import os
import shutil
import stat
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeglm.bundle.archive import ArchiveKind
from edgeglm.bundle.bom import BOM_NAME
from edgeglm.bundle.extract import Limits
from edgeglm.bundle.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    TargetRecord,
    TowerRecord,
    VariantRecord,
    content_digest,
    manifest_bytes,
)
from edgeglm.bundle.pack import archive_path, write_bundle
from edgeglm.bundle.verify import open_bundle, verify_report
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import UserError

MODEL = "models/fp32/image.onnx"


def manifest_of(files: dict[str, bytes]) -> bytes:
    """A manifest that promises these files and is valid in itself."""
    records = {name: FileRecord(sha256=sha256_bytes(data), size=len(data)) for name, data in files.items()}
    return manifest_with(records)


def manifest_with(records: dict[str, FileRecord]) -> bytes:
    records = {MODEL: FileRecord(sha256="0" * 64, size=0)} | records
    return manifest_bytes(
        Manifest(
            name="crafted",
            created="2026-11-23",
            edgeglm="0.1.0",
            target=TargetRecord(name="cpu"),
            default_variant="fp32",
            variants=(VariantRecord(name="fp32", files={"image": MODEL}, gate="reference"),),
            towers={"image": TowerRecord(inputs=(), outputs=(), embedding_dim=4, parameters=1)},
            files=records,
            content_digest=content_digest(records),
        )
    )


def tar_zst(
    path: Path, members: Sequence[tuple[tarfile.TarInfo | str, bytes]], *, format: int = tarfile.USTAR_FORMAT
):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for entry, data in members:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(zstandard.compress(buffer.getvalue()))
    return path


def zipped(path: Path, members: Sequence[tuple[zipfile.ZipInfo | str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in members:
            archive.writestr(entry, data)
    return path


@pytest.fixture(params=["tar.zst", "zip"])
def crafted(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Write an archive of one of the two kinds from (name, content) pairs."""

    def write(*members: tuple[str, bytes]) -> Path:
        folder = tmp_path / "crafted"
        folder.mkdir(exist_ok=True)
        path = folder / f"crafted.{request.param}"
        return zipped(path, list(members)) if request.param == "zip" else tar_zst(path, list(members))

    return write


@pytest.fixture(params=["folder", "tar.zst", "zip"])
def any_bundle(request: pytest.FixtureRequest, tmp_path: Path, manifest, sources) -> Path:
    """A whole bundle in each of its three forms."""
    kind: ArchiveKind = "none" if request.param == "folder" else request.param
    folder = write_bundle(tmp_path / "any", sources=sources, manifest=manifest, archive=kind)
    archive = archive_path(folder, kind)
    if archive is None:
        return folder
    shutil.rmtree(folder)
    return archive


def refused(path: Path, match: str) -> None:
    """Open must fail with this message and leave neither the wanted nor a temporary folder."""
    wanted = path.parent / "out"
    with pytest.raises(UserError, match=match):
        open_bundle(path)
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
    if path.is_file():
        outside = set(path.parent.iterdir())
        with pytest.raises(UserError, match=match):
            open_bundle(path, extract_to=wanted)
        assert set(path.parent.iterdir()) == outside


def test_every_form_of_a_bundle_opens_with_the_same_content(any_bundle, sources, tree):
    with open_bundle(any_bundle) as bundle:
        assert bundle.verified
        files = tree(bundle.path)
        assert files.pop(MANIFEST_NAME)
        assert files.pop(BOM_NAME)
        assert files == sources
        assert bundle.variant().name == "int8"
        assert bundle.model(None, "text").read_bytes() == sources["models/int8/text.onnx"]
        assert bundle.preprocessing.image.resolution == 8
        assert bundle.tokenizer_path.read_bytes() == b"{}"
        gallery = bundle.gallery()
        assert gallery.embeddings.shape == (12, 4)
        assert bundle.thumbnail(gallery.items[3]) == bundle.path / "gallery" / "thumbnails" / "3.png"
        assert bundle.thumbnail(gallery.items[4]) is None
        with pytest.raises(UserError, match=r"unknown variant 'int9'.*did you mean 'int8'\?"):
            bundle.variant("int9")
        with pytest.raises(UserError, match="unknown tower"):
            bundle.model("fp32", "texts")
    assert any_bundle.exists()
    assert bundle.path.exists() == any_bundle.is_dir()


def test_an_archive_is_extracted_where_it_is_wanted(tmp_path, packed, manifest, sources, tree):
    write_bundle(packed, sources=sources, manifest=manifest, archive="tar.zst")
    with open_bundle(tmp_path / "demo.bundle.tar.zst", extract_to=tmp_path / "kept") as bundle:
        assert bundle.path == tmp_path / "kept"
    assert tree(tmp_path / "kept") == tree(packed)
    with pytest.raises(UserError, match="there already"):
        open_bundle(tmp_path / "demo.bundle.tar.zst", extract_to=tmp_path / "kept")


def test_verify_reports_what_was_read(any_bundle, sources):
    report = verify_report(any_bundle)
    assert (report.name, report.files) == ("demo", len(sources) + 1), "and the bill of materials"
    assert report.size > sum(map(len, sources.values()))
    assert report.signature == "not signed"
    assert len(report.content_digest) == 64


def test_one_altered_byte_is_named_with_both_digests(packed, sources):
    for name, data in sources.items():
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 1
        (packed / name).write_bytes(changed)
        expected = f"{name} has sha256 {sha256_bytes(bytes(changed))}, the manifest says {sha256_bytes(data)}"
        with pytest.raises(UserError) as caught:
            open_bundle(packed)
        assert expected in str(caught.value)
        (packed / name).write_bytes(data)
    assert open_bundle(packed).verified


def test_unverified_opening_reads_the_manifest_only(packed):
    (packed / MODEL).write_bytes(b"other")
    assert not open_bundle(packed, verify=False).verified


def test_a_truncated_file_is_named(packed):
    os.truncate(packed / MODEL, 3)
    refused(packed, f"{MODEL} has 3 bytes, the manifest says")


def test_an_archive_cut_off_anywhere_is_refused(any_bundle):
    if any_bundle.is_dir():
        (any_bundle / MODEL).unlink()
        refused(any_bundle, f"lacks {MODEL}")
        return
    whole = any_bundle.read_bytes()
    for keep in (4, 5, 100, len(whole) // 2, len(whole) - 30):
        any_bundle.write_bytes(whole[:keep])
        refused(any_bundle, "cut off|damaged|get it again")


def test_something_else_is_no_bundle(tmp_path):
    refused(tmp_path / "absent", "there is no bundle")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no manifest\.json")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "is no bundle")
    refused(Path("/dev/null"), "is no bundle")


def test_extra_files_links_and_devices_in_a_folder_are_refused(packed):
    (packed / "extra").write_text("x")
    refused(packed, "'extra', which is not in its manifest")
    (packed / "extra").unlink()
    (packed / "extra").symlink_to("/etc/passwd")
    refused(packed, "'extra', which is a link or a device")
    (packed / "extra").unlink()
    os.mkfifo(packed / "extra")
    refused(packed, "'extra', which is a link or a device")
    (packed / "extra").unlink()
    (packed / MODEL).unlink()
    (packed / MODEL).symlink_to("/etc/passwd")
    refused(packed, "which is a link or a device")


def test_a_linked_manifest_is_refused(packed):
    (packed / MANIFEST_NAME).rename(packed.parent / "m.json")
    (packed / MANIFEST_NAME).symlink_to(packed.parent / "m.json")
    refused(packed, "is no bundle")


@pytest.mark.parametrize(
    "name", ["../climbed", "/climbed", "a/../../climbed", "a\\..\\climbed", "./a", "C:a"]
)
def test_a_member_that_climbs_out_is_refused(crafted, name):
    refused(
        crafted((MANIFEST_NAME, manifest_of({MODEL: b""})), (name, b"gotcha")),
        "climb|absolute|part|character",
    )


@pytest.mark.parametrize("name", ["../climbed", "/climbed"])
def test_a_manifest_that_lists_a_climbing_file_is_refused(packed, name):
    tree = json.loads((packed / MANIFEST_NAME).read_bytes())
    tree["files"][name] = {"sha256": "0" * 64, "size": 0}
    (packed / MANIFEST_NAME).write_text(json.dumps(tree))
    refused(packed, "climbs out|absolute")


def test_members_that_are_not_listed_or_come_twice_are_refused(crafted):
    listed = {MODEL: b"model"}
    manifest = (MANIFEST_NAME, manifest_of(listed))
    refused(crafted(manifest, (MODEL, b"model"), ("extra", b"")), "'extra' is not in the manifest")
    refused(crafted(manifest, (MODEL, b"model"), ("MODELS/fp32/image.onnx", b"")), "is not in the manifest")
    with suppress(UserWarning):  # zipfile warns of the duplicate; tarfile does not
        path = crafted(manifest, (MODEL, b"model"), (MODEL, b"model"))
        refused(path, "comes twice")
    refused(crafted(manifest), "ends before")
    refused(crafted(manifest, (MODEL, b"longer than listed")), "has 18 bytes, the manifest says 5")
    refused(crafted(manifest, (MODEL, b"nodel")), "has sha256 .*, the manifest says")
    refused(crafted((MODEL, b"model")), r"does not begin with manifest\.json")
    refused(crafted(), r"does not begin|cannot read|no bundle")


def test_links_and_devices_in_a_tar_are_refused(tmp_path):
    manifest = (MANIFEST_NAME, manifest_of({MODEL: b""}))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        entry = tarfile.TarInfo(MODEL)
        entry.type, entry.linkname = kind, "/etc/passwd"
        refused(tar_zst(tmp_path / "a.tar.zst", [manifest, (entry, b"")]), "not a plain file")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_header_that_asks_for_memory_is_refused(tmp_path, format):
    long_name = ("x" * 99 + "/") * 3 + "y"
    members = [(MANIFEST_NAME, manifest_of({MODEL: b""})), (long_name, b"")]
    refused(tar_zst(tmp_path / "a.tar.zst", members, format=format), "not a plain file")


def test_links_and_encrypted_members_of_a_zip_are_refused(tmp_path):
    manifest = (MANIFEST_NAME, manifest_of({MODEL: b"/etc/passwd"}))
    link = zipfile.ZipInfo(MODEL)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(zipped(tmp_path / "a.zip", [manifest, (link, b"/etc/passwd")]), "not a plain file")
    path = zipped(tmp_path / "b.zip", [manifest, (MODEL, b"/etc/passwd")])
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 8] |= 1
    path.write_bytes(data)
    refused(path, "not a plain file")


def test_a_zip_bomb_is_refused_before_it_expands(crafted, tmp_path):
    size = 100 << 20
    records = {MODEL: FileRecord(sha256="1" * 64, size=size)}
    bomb = crafted((MANIFEST_NAME, manifest_with(records)), (MODEL, bytes(size)))
    assert bomb.stat().st_size < size / 200
    refused(bomb, "as zip bombs do .*; get it again from its maker")
    shutil.rmtree(tmp_path / "crafted")


def test_what_is_over_the_limits_or_the_disk_is_refused(crafted):
    members = (MANIFEST_NAME, manifest_of({MODEL: b"model"})), (MODEL, b"model")
    for limits in (Limits(files=0), Limits(file_bytes=4), Limits(total_bytes=4)):
        with pytest.raises(UserError, match=r"over the limits of a bundle; get it again from its maker$"):
            open_bundle(crafted(*members), limits=limits)
    huge = {MODEL: FileRecord(sha256="1" * 64, size=1 << 50)}
    with pytest.raises(UserError, match="free some space"):
        open_bundle(
            crafted((MANIFEST_NAME, manifest_with(huge)), (MODEL, b"")),
            limits=Limits(file_bytes=1 << 60, total_bytes=1 << 60, ratio=1e18),
        )


def test_a_lying_zip_table_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", [(MANIFEST_NAME, manifest_of({MODEL: b""})), (MODEL, b"")])
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    data[end + 12 : end + 16] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "table of contents")


def test_verification_needs_little_memory_for_a_large_file(tmp_path, manifest, sources):
    sources["models/int8/image.onnx"] = os.urandom(1 << 20) * 48
    folder = write_bundle(tmp_path / "b", sources=sources, manifest=manifest, archive="tar.zst")
    del sources
    for path in (folder, folder.with_name("b.tar.zst")):
        tracemalloc.start()
        try:
            with open_bundle(path) as bundle:
                assert bundle.verified
            assert tracemalloc.get_traced_memory()[1] < 12 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("kind", ["tar.zst", "zip"])
def test_a_mutated_archive_is_refused_or_whole_and_writes_nothing_outside(tmp_path, manifest, sources, kind):
    folder = write_bundle(tmp_path / "b", sources=sources, manifest=manifest, archive=kind)
    archive = archive_path(folder, kind)
    assert archive is not None
    whole = archive.read_bytes()
    cage = tmp_path / "cage"
    expected = open_bundle(folder).manifest

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def mutate(data: st.DataObject) -> None:
        mutated = bytearray(whole)
        if kind == "tar.zst" and data.draw(st.booleans()):  # inside the compression, past its checksum
            mutated = bytearray(zstandard.decompress(whole, max_output_size=1 << 24))
        inner = len(mutated) > len(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(mutated) - 1))
            mutated[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        shutil.rmtree(cage, ignore_errors=True)
        cage.mkdir()
        path = cage / "m"
        path.write_bytes(zstandard.compress(bytes(mutated)) if inner else bytes(mutated))
        with suppress(UserError):
            assert open_bundle(path, extract_to=cage / "out").manifest.files == expected.files
        assert {p.name for p in cage.iterdir()} <= {"m", "out"}

    mutate()
