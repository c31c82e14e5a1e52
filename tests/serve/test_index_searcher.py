from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.progress import QuietProgress
from edgeglm.index.opening import FolderSource, added_to_index, built_index
from edgeglm.index.writer import IndexWriter
from scripts.fixtures.colours import COLOURS, picture
from tests.serve.asking import asked, asked_json
from tests.serve.conftest import Server, running, serve_command

QUIET = QuietProgress()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pictures") / "shop"
    made.mkdir()
    for name, colour in COLOURS.items():
        (made / f"{name}?#%2e&.png").write_bytes(picture(colour))  # what a URL must not trip over
    return made


@pytest.fixture(scope="module")
def index(bundles: Path, folder: Path) -> Path:
    made = folder.parent / "shop.index"
    with open_bundle(bundles / "colours") as opened:
        built_index(opened, FolderSource(folder=folder), made, QUIET)
    return made


@pytest.fixture(scope="module")
def site(bundles: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("site") / "log"
    with running(log, serve_command(bundles / "colours", "--index", str(index), "--no-grpc")) as found:
        yield found


def got(site: Server, path: str) -> tuple[int, dict[str, str], bytes]:
    """Ask for a path exactly as it is written."""
    connection = http.client.HTTPConnection(site.address, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_an_index_called_gallery_is_not_taken_for_the_bundles(bundles: Path, index: Path, tmp_path: Path):
    shutil.copytree(index, tmp_path / "gallery")
    command = serve_command(bundles / "colours", "--index", str(tmp_path / "gallery"), "--no-grpc")
    with running(tmp_path / "log", command) as server:
        found = searched(server, q="red", where="kind=png")
        assert found["searched"] == {"name": "gallery", "rows": 3, "filters": True}
        assert found["hits"]
        assert asked_json(server, "GET", "/v1/stats")["searched"]["filters"]


def searched(site: Server, **query: Any) -> dict[str, Any]:
    status, _, body = got(site, "/v1/search?" + urlencode(query))
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


def got_hits(site: Server, query: str) -> list[Any]:
    status, _, body = got(site, f"/v1/search?q=red&{query}")
    assert status == 200, body
    hits: list[Any] = json.loads(body)["hits"]
    return hits


def test_a_search_names_its_pictures_and_serves_them(site: Server):
    found = searched(site, q="red", k=3, inline=1)
    first, second = found["hits"][:2]
    assert first["id"] == "shop/red?#%2e&.png"
    assert first["score"] == pytest.approx(1.0, abs=1e-3)
    assert first["data"].startswith("data:image/webp;base64,")
    assert "data" not in second
    assert found["searched"] == {"name": "shop.index", "rows": 3, "filters": True}
    status, headers, body = got(site, first["picture"])
    assert (status, headers["content-type"], body[:4]) == (200, "image/webp", b"RIFF")
    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    [
        "../../../../etc/passwd",
        "/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "shop/../index.json",
        "%00",
        "shop",
        "%ff",
    ],
)
def test_no_path_from_outside_is_ever_opened(site: Server, name: str):
    status, _, body = got(site, f"/v1/pictures/{name}")
    assert status in (400, 404)
    assert b"root:" not in body
    assert b"schema" not in body


def test_a_filter_is_taken_from_the_url_and_a_wrong_one_explained(site: Server):
    assert searched(site, q="red", where='{"kind": "png", "bytes": {">": 1}}')["hits"]
    assert not searched(site, q="red", where='{"bytes": {"<": 1}}')["hits"]
    assert searched(site, q="red", where="kind=png bytes>1")["hits"]
    assert not searched(site, q="red", where="bytes<1")["hits"]
    assert not got_hits(site, "where=kind%3Dpng&where=bytes%3C1")
    assert not got_hits(site, "where=bytes%3C1&where=kind%3Dpng")
    assert len(got_hits(site, "where=name!%3Dred&where=kind%3Dpng")) == 3
    for where, why in (
        ("kind", "write it like"),
        ('{"knd": "png"}', "did you mean 'kind'"),
        ('{"kind": {"~": 1}}', "unknown operator"),
    ):
        status, _, body = got(site, f"/v1/search?q=red&where={quote(where)}")
        assert status == 400
        assert why in json.loads(body)["error"]


def test_what_a_writer_adds_and_removes_is_found_by_a_running_server(
    site: Server, bundles: Path, index: Path, folder: Path
):
    (folder / "crimson.png").write_bytes(picture((255, 10, 10)))
    with open_bundle(bundles / "colours") as opened:
        added_to_index(opened, FolderSource(folder=folder), index, QUIET)
    assert "shop/crimson.png" in {hit["id"] for hit in searched(site, q="red")["hits"]}
    with IndexWriter(index) as writer:
        writer.remove(["shop/crimson.png"])
        writer.fold()
    found = searched(site, q="red")
    assert "shop/crimson.png" not in {hit["id"] for hit in found["hits"]}
    assert found["searched"]["rows"] == 3
    assert got(site, "/v1/pictures/shop/crimson.png")[0] == 404


def test_a_server_refuses_an_index_of_another_space_and_names_the_way_out(bundles: Path, index: Path):
    command = serve_command(bundles / "turned", "--index", str(index), "--no-grpc")
    result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "they cannot be compared" in result.stderr
    assert "edgeglm index build" in result.stderr


def test_an_index_that_is_replaced_serves_its_rows_only_within_the_space(
    bundles: Path, index: Path, folder: Path, tmp_path: Path
):
    served = tmp_path / "shop.index"
    shutil.copytree(index, served)
    for name, bundle, pictures in (
        ("same", "colours", folder / "red?#%2e&.png"),
        ("other", "turned", folder),
    ):
        with open_bundle(bundles / bundle) as opened:
            built_index(opened, FolderSource(folder=pictures), tmp_path / name, QUIET)
    command = serve_command(bundles / "colours", "--index", str(served), "--no-grpc")
    with running(tmp_path / "log", command) as server:
        assert searched(server, q="red")["searched"]["rows"] == 3
        served.rename(tmp_path / "former")
        assert got(server, "/v1/search?q=red")[0] == 503
        (tmp_path / "other").rename(served)
        status, _, body = got(server, "/v1/search?q=red")
        assert (status, b"another embedding space" in body) == (503, True)
        shutil.rmtree(served)
        (tmp_path / "same").rename(served)
        assert searched(server, q="red")["searched"]["rows"] == 1


def test_searches_go_on_while_bundles_are_swapped_and_each_answer_is_of_one_bundle(
    bundles: Path, index: Path, tmp_path: Path
):
    for name in ("colours", "again"):
        shutil.copytree(bundles / "colours", tmp_path / "bundles" / name)
    shutil.copytree(bundles / "turned", tmp_path / "bundles" / "turned")
    control = ("--control", "--bundles", str(tmp_path / "bundles"), "--no-grpc")
    for options, names, digests in (
        (("--index", str(index)), ("again", "colours"), 1),
        ((), ("turned", "colours"), 2),  # whose text tower says the opposite
    ):
        with running(tmp_path / "log", serve_command(bundles / "colours", *control, *options)) as server:
            found: list[tuple[int, str, str, bytes]] = []
            stop = threading.Event()

            def search(server: Server = server, found: list[Any] = found, stop: Any = stop) -> None:
                while not stop.is_set():
                    status, headers, body = got(server, "/v1/search?q=red&k=1&inline=1")
                    told = json.loads(body)
                    best = told["hits"][0]["id"] if status == 200 else ""
                    digest = told.get("edgeglm", {}).get("digest", "")
                    assert digest == headers["edgeglm-digest"] or status != 200
                    found.append((status, digest, best, body))

            with ThreadPoolExecutor(6) as threads:
                asking = [threads.submit(search) for _ in range(6)]
                try:
                    for turn in range(12):
                        load = json.dumps({"parameters": {"bundle": names[turn % 2]}}).encode()
                        status, _, body = asked(server, "POST", "/v2/repository/models/text/load", load)
                        assert status == 200, body
                finally:
                    stop.set()
                for one in asking:
                    one.result()
            assert [body for status, _, _, body in found if status != 200] == []
            assert len(found) > 50
            # a vector of one bundle that met the rows of another would give a second answer for a digest
            answers = {(digest, best) for _, digest, best, _ in found}
            assert len(answers) == len({digest for digest, _ in answers}) == digests
