from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeglm.bundle import signing
from edgeglm.bundle.archive import archive_from_folder
from edgeglm.bundle.bom import BOM_NAME
from edgeglm.bundle.manifest import MANIFEST_NAME, SIGNATURES_NAME, Manifest
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.pack import write_bundle
from edgeglm.bundle.sign import sign_bundle
from edgeglm.bundle.signing import make_key, public_key_from_file, signatures_from_bytes
from edgeglm.bundle.trust import TRUST_VARIABLE, Trust, accept, trust_here
from edgeglm.bundle.verify import open_bundle, verify_report
from edgeglm.cli import main as cli
from edgeglm.core.errors import UserError

pytest.importorskip("cryptography")

Keys = Callable[[str], Path]


@pytest.fixture
def key(tmp_path: Path) -> Keys:
    def made(name: str) -> Path:
        path = tmp_path / "keys" / f"{name}.key"
        return path if path.exists() else make_key(tmp_path / "keys", name)[0]

    return made


@pytest.fixture
def trusting(tmp_path: Path, key: Keys, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trust]:
    """Put public keys into this machine's trust folder."""
    folder = tmp_path / "trust"
    monkeypatch.setenv(TRUST_VARIABLE, str(folder))

    def trusted(*names: str) -> Trust:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.pub"):
            old.unlink()
        for name in names:
            (folder / f"{name}.pub").write_bytes(key(name).with_suffix(".pub").read_bytes())
        return trust_here()

    return trusted


def archived(folder: Path, kind: str) -> Path:
    path = folder.with_name(f"{folder.name}.{kind}")
    with open_bundle(folder, trust=Trust()) as bundle:
        archive_from_folder(folder, bundle.manifest.files, path, kind)  # type: ignore[arg-type]
    return path


def bundle_signatures(bundle: Bundle) -> bytes:
    return (bundle.path / SIGNATURES_NAME).read_bytes()


@pytest.fixture(params=["folder", "zip", "tar.zst"])
def form(request: pytest.FixtureRequest, packed: Path) -> Path:
    return packed if request.param == "folder" else archived(packed, request.param)


def test_a_signed_bundle_opens_where_its_key_is_trusted(form: Path, key: Keys, trusting):
    sign_bundle(form, [key("maker")])
    trusting("maker")
    with open_bundle(form) as bundle:
        assert bundle.verified
        assert bundle.signature.signer is not None
        assert bundle.signature.signer.name == "maker"
    assert verify_report(form).signature.startswith("signed by maker (")


def test_an_unsigned_bundle_is_refused_once_a_key_is_trusted(form: Path, trusting):
    open_bundle(form).close()
    trusting("maker")
    with pytest.raises(UserError, match="is not signed, and this machine takes bundles of maker only"):
        open_bundle(form)
    with open_bundle(form, trust=trust_here(allow_unsigned=True)) as bundle:
        assert bundle.signature.words == "not signed"


def test_a_bundle_signed_again_by_a_stranger_is_refused_with_his_key(form: Path, key: Keys, trusting):
    sign_bundle(form, [key("stranger")])
    trusting("maker")
    stranger = public_key_from_file(key("stranger").with_suffix(".pub")).id
    with pytest.raises(UserError, match=f"signed by a key that is not trusted here .{stranger}"):
        open_bundle(form)


def test_a_tampered_manifest_is_refused_before_it_is_parsed(packed: Path, key: Keys, trusting, monkeypatch):
    sign_bundle(packed, [key("maker")])
    trusting("maker")
    manifest = packed / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b'"demo"', b'"dem0"'))

    def parse(*_: object) -> Manifest:
        raise AssertionError("the manifest was parsed")

    monkeypatch.setattr("edgeglm.bundle.verify.manifest_from_bytes", parse)
    with pytest.raises(UserError, match="does not fit the manifest"):
        open_bundle(packed)


def test_a_broken_signature_is_refused_even_where_none_is_asked_for(packed: Path, key: Keys):
    sign_bundle(packed, [key("maker")])
    manifest = packed / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(UserError, match="does not fit the manifest"):
        open_bundle(packed)


def test_a_key_is_rotated_without_a_day_on_which_no_bundle_opens(packed: Path, key: Keys, trusting):
    sign_bundle(packed, [key("old"), key("new")])
    for names in (["old"], ["old", "new"], ["new"]):
        trusting(*names)
        open_bundle(packed).close()
    sign_bundle(packed, [key("new")], replace=True)
    open_bundle(packed).close()
    trusting("old")
    with pytest.raises(UserError, match="not trusted here"):
        open_bundle(packed)


def test_signing_again_adds_and_does_not_repeat(packed: Path, key: Keys):
    sign_bundle(packed, [key("one")])
    assert [s.name for s in sign_bundle(packed, [key("one"), key("two")])].count("one") == 1


def test_what_a_link_names_is_signed_and_not_the_link(form: Path, key: Keys, tmp_path: Path):
    link = tmp_path / "latest"
    link.symlink_to(form)
    sign_bundle(link, [key("maker")])
    assert link.is_symlink()
    with open_bundle(form, trust=Trust()) as bundle:
        assert bundle.signature.signed


def test_a_bundle_outlives_more_signatures_than_it_may_carry(form: Path, key: Keys):
    sign_bundle(form, [key("first")])
    with pytest.raises(UserError, match="these are 17 signatures, and a bundle carries 16 at most"):
        sign_bundle(form, [key(f"k{number}") for number in range(16)])
    with open_bundle(form, trust=Trust()) as bundle:
        assert [s.name for s in signatures_from_bytes(bundle_signatures(bundle), "").signatures] == ["first"]


@pytest.mark.parametrize("name", [b"k" * 120, b"k\xff"])
def test_a_key_of_any_name_signs_what_can_be_opened(name: bytes, form: Path, key: Keys):
    named = key("maker").with_name(os.fsdecode(name + b".key"))
    key("maker").rename(named)
    sign_bundle(form, [named])
    with open_bundle(form, trust=Trust()) as bundle:
        assert bundle.signature.signed


def test_an_older_bundle_is_a_replay_unless_it_is_meant(
    tmp_path: Path, manifest: Manifest, sources, key: Keys, trusting
):
    old = write_bundle(tmp_path / "old", sources=sources, manifest=manifest)
    later = msgspec.structs.replace(manifest, created="2026-12-01T00:00:00Z")
    new = write_bundle(tmp_path / "new", sources=sources, manifest=later)
    for path in (old, new):
        sign_bundle(path, [key("maker")])
    trust = trusting("maker")
    with open_bundle(new) as bundle:
        accept(trust, bundle.manifest, bundle.signature)
    with pytest.raises(UserError, match="an old one may be a replay; pass --allow-downgrade"):
        open_bundle(old)
    open_bundle(new).close()
    with open_bundle(old, trust=trust_here(allow_downgrade=True)) as bundle:
        accept(trust, bundle.manifest, bundle.signature)
    open_bundle(old).close()


def test_leave_to_take_unsigned_bundles_is_no_leave_to_go_back(
    tmp_path: Path, manifest: Manifest, sources, key: Keys, trusting
):
    old = write_bundle(tmp_path / "old", sources=sources, manifest=manifest)
    later = msgspec.structs.replace(manifest, created="2026-12-01T00:00:00Z")
    new = write_bundle(tmp_path / "new", sources=sources, manifest=later)
    sign_bundle(new, [key("maker")])
    trust = trusting("maker")
    with open_bundle(new) as bundle:
        accept(trust, bundle.manifest, bundle.signature)
    for signed in (False, True):
        if signed:
            sign_bundle(old, [key("maker")])
        with pytest.raises(UserError, match="an old one may be a replay; pass --allow-downgrade"):
            open_bundle(old, trust=trust_here(allow_unsigned=True))
    open_bundle(old, trust=trust_here(allow_unsigned=True, allow_downgrade=True)).close()


def test_an_unsigned_bundle_with_a_late_date_locks_no_signed_one_out(
    tmp_path: Path, manifest: Manifest, sources, key: Keys, trusting
):
    trusting("maker")
    late = msgspec.structs.replace(manifest, created="9999-12-31T00:00:00Z")
    unsigned = write_bundle(tmp_path / "late", sources=sources, manifest=late)
    trust = trust_here(allow_unsigned=True)
    with open_bundle(unsigned, trust=trust) as bundle:
        accept(trust, bundle.manifest, bundle.signature)
    signed = write_bundle(tmp_path / "new", sources=sources, manifest=manifest)
    sign_bundle(signed, [key("maker")])
    open_bundle(signed).close()


def test_a_private_key_is_for_its_owner_alone_and_never_overwritten(tmp_path: Path, key: Keys):
    private = key("maker")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="is there already"):
        make_key(private.parent, "maker")
    with pytest.raises(UserError, match="is no name for a key"):
        make_key(tmp_path, "../maker")


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 70_000, b'{"schema":1,"signatures":[]}', b"\xff"])
def test_a_signature_file_that_is_none_is_refused(content: bytes, packed: Path):
    (packed / SIGNATURES_NAME).write_bytes(content)
    with pytest.raises(UserError, match=SIGNATURES_NAME):
        open_bundle(packed)


def test_a_signature_of_other_bytes_with_the_same_key_does_not_pass(packed: Path, key: Keys, monkeypatch):
    monkeypatch.setattr(signing, "_CONTEXT", b"something else\0")
    sign_bundle(packed, [key("maker")])
    monkeypatch.undo()
    with pytest.raises(UserError, match="does not fit the manifest"):
        open_bundle(packed)


@pytest.mark.parametrize("field", ["public_key", "signature"])
def test_a_signature_has_one_spelling_only(field: str, packed: Path, key: Keys, trusting):
    sign_bundle(packed, [key("maker")])
    trusting("maker")
    place = packed / SIGNATURES_NAME
    whole = json.loads(place.read_bytes())
    text = whole["signatures"][0][field]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = len(text.rstrip("=")) - 1
    other = text[:last] + letters[letters.index(text[last]) + 1] + text[last + 1 :]
    assert base64.b64decode(other) == base64.b64decode(text), "bits after the last byte"
    whole["signatures"][0][field] = other
    place.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="have the bundle signed anew"):
        open_bundle(packed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_of_a_signature_is_accepted(data, packed: Path, key: Keys, trusting):
    if not (packed / SIGNATURES_NAME).exists():
        sign_bundle(packed, [key("maker")])
        trusting("maker")
        (packed.parent / "good").write_bytes((packed / SIGNATURES_NAME).read_bytes())
    good = (packed.parent / "good").read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(good)
    changed[place] ^= 1 << bit
    (packed / SIGNATURES_NAME).write_bytes(bytes(changed))
    before, after = (_meaning(content) for content in (good, bytes(changed)))
    if after == before:  # white space, or the name, which is a word for people
        return
    with pytest.raises(UserError):
        open_bundle(packed)


def _meaning(content: bytes) -> object:
    try:
        parsed = signatures_from_bytes(content, "x")
    except UserError:
        return None
    return [(one.public_key, one.signature) for one in parsed.signatures]


def test_a_machine_without_cryptography_says_what_to_install(packed: Path, key: Keys, trusting, monkeypatch):
    sign_bundle(packed, [key("maker")])
    monkeypatch.setattr("edgeglm.bundle.trust.can_check", lambda: False)
    with open_bundle(packed) as bundle:
        assert bundle.signature.words == "signed; install edgeglm[sign] to check by whom"
    trusting("maker")
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(UserError, match=r"pip install 'edgeglm\[sign\]'"):
        open_bundle(packed)


def test_the_commands_go_from_a_key_to_a_trusted_bundle(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert cli.exit_code(["keygen", "maker", "--folder", str(tmp_path / "k")]) == 0
    assert cli.exit_code(["sign", str(packed), "--key", str(tmp_path / "k/maker.key")]) == 0
    capsys.readouterr()
    assert cli.exit_code(["verify", str(packed)]) == 0
    assert "not trusted here" in capsys.readouterr().out
    monkeypatch.setenv(TRUST_VARIABLE, str(tmp_path / "k"))
    assert cli.exit_code(["verify", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]["signature"].startswith("signed by maker")
    (packed / SIGNATURES_NAME).unlink()
    assert cli.exit_code(["inspect", str(packed)]) == 2
    assert "pass --allow-unsigned" in capsys.readouterr().err
    assert cli.exit_code(["inspect", str(packed), "--allow-unsigned"]) == 0


def test_the_bill_of_materials_names_models_data_and_licences_and_is_signed_with_the_rest(packed: Path):
    document = json.loads((packed / BOM_NAME).read_bytes())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    models = [part for part in document["components"] if part["type"] == "machine-learning-model"]
    with open_bundle(packed) as bundle:
        files = bundle.manifest.files
        assert BOM_NAME in files
    assert {part["hashes"][0]["content"] for part in models} == {
        record.sha256 for name, record in files.items() if name.startswith("models/")
    }
    (noto,) = [part for part in document["components"] if part["type"] == "data"]
    assert noto["licenses"] == [{"license": {"name": "Apache-2.0"}}]
