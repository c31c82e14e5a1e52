from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from edgeglm.bundle.archive import archive_from_folder
from edgeglm.bundle.opened import Bundle
from edgeglm.bundle.verify import open_bundle
from edgeglm.serve.config import ServeConfig
from edgeglm.serve.refusals import NotFoundError, NotReadyError
from edgeglm.serve.service import Service


@pytest.mark.parametrize("times", [1, 2])
def test_callers_who_give_up_a_load_do_not_fill_the_disk_with_extracted_archives(
    times: int, bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A deadline over gRPC ends the call and no thread: each try left the whole archive behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_bundle(bundles / "turned") as bundle:
        archive_from_folder(bundle.path, bundle.manifest.files, tmp_path / "turned.zip", "zip")
    extracted, go_on = threading.Event(), threading.Event()

    def opened(path: Path) -> Bundle:
        bundle = open_bundle(path)
        if path.suffix == ".zip":
            extracted.set()
            assert go_on.wait(20)
        return bundle

    async def run() -> None:
        config = ServeConfig(control=True, bundles=tmp_path)
        async with Service(bundles / "colours", config, opened=opened) as service:
            loading = asyncio.create_task(service.load("text", "turned.zip"))
            await asyncio.to_thread(extracted.wait, 20)
            for _ in range(times):  # one who is in a hurry waits for no thread
                loading.cancel()
                await asyncio.sleep(0.05)
            assert loading.done() == (times > 1)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await loading
            for _ in range(1000 if times > 1 else 0):  # one who waited finds it closed
                await asyncio.sleep(0.02 if list(tmp_path.glob("edgeglm-bundle-*")) else 0)
            assert not list(tmp_path.glob("edgeglm-bundle-*"))
            assert service.identity.bundle == "colours"
            await service.load("text", "turned.zip")
            assert service.bundle.origin == tmp_path / "turned.zip"

    asyncio.run(run())


def test_a_folder_of_bundles_that_is_not_mounted_is_told_as_that(bundles: Path, tmp_path: Path):
    """A load was answered with "the server failed on this request", which nobody can help."""
    (tmp_path / "media").mkdir()

    async def run() -> None:
        config = ServeConfig(control=True, bundles=tmp_path / "media")
        async with Service(bundles / "colours", config, opened=open_bundle) as service:
            (tmp_path / "media").rmdir()
            with pytest.raises(NotReadyError, match="cannot list the folder of bundles"):
                await service.load("text", "turned")
            assert service.identity.bundle == "colours"

    asyncio.run(run())


def test_a_build_into_the_served_folder_shows_no_picture_of_the_new_bundle_for_a_row_of_the_former(
    bundles: Path, tmp_path: Path
):
    """The server answers with the rows that it opened: their pictures were those of other rows since."""
    served = tmp_path / "served"
    shutil.copytree(bundles / "colours", served)

    async def run() -> None:
        async with Service(served, ServeConfig(), opened=open_bundle) as service:
            searcher = service.served.require_searcher()
            picture = searcher.picture("set/red")
            assert isinstance(picture, Path)
            picture.write_bytes((served / "gallery/thumbnails/red.png").read_bytes() + b"another")
            with pytest.raises(NotFoundError, match="since this server opened its bundle"):
                searcher.picture("set/red")
            picture.unlink()
            with pytest.raises(NotFoundError, match="start the server again"):
                searcher.picture("set/red")

    asyncio.run(run())
