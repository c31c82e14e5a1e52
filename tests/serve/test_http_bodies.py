"""If these fail, a body that is wrong, too large or packed is answered with less than what to do about it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from scripts.fixtures.colours import COLOURS, picture
from tests.runtime.test_runner_bundle import bomb
from tests.serve.asking import TEXT, asked, asked_json, refused
from tests.serve.conftest import Server


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no inference request"),
        (b"\xff\xfe", "no inference request"),
        (b'{"inputs": ', "no inference request"),
        (b'{"inputs": 3}', r"\$.inputs"),
        (b'{"inputs": [], "more": 1}', "unknown field `more`"),
        (b'{"inputs": []}', "no rows"),
        (b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES"}]}', "has no data"),
        (json.dumps({"inputs": [TEXT, TEXT]}).encode(), "twice"),
        (json.dumps({"inputs": [{**TEXT, "data": ["a", "b"]}]}).encode(), "must be 1 strings"),
        (json.dumps({"inputs": [{**TEXT, "data": [1]}]}).encode(), "must be 1 strings"),
        (json.dumps({"inputs": [{**TEXT, "shape": [-1]}]}).encode(), "shape"),
        (json.dumps({"inputs": [{**TEXT, "shape": [2**39, 2**39]}]}).encode(), "strings"),
        (json.dumps({"inputs": [{**TEXT, "datatype": "FP31"}]}).encode(), "did you mean"),
        (json.dumps({"inputs": [{**TEXT, "data": ["  "]}]}).encode(), "a text is empty"),
        (b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]}', ""),
        (b'{"inputs": ' + b"[" * 100_000, "no inference request"),
        (
            b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["\xff"]}]}',
            "is no JSON",
        ),
    ],
)
def test_bodies_that_are_no_request_are_told_what_is_wrong(server: Server, body: bytes, words: str):
    status, error = refused(server, "/v2/models/embed_text/infer", body)
    assert status == 400
    assert re.search(words, error), error


@pytest.mark.parametrize(
    ("length", "size", "data", "words"),
    [
        ("9999", 16, b"\0" * 16, "Inference-Header-Content-Length"),
        ("-1", 16, b"\0" * 16, "no number"),
        ("x", 16, b"\0" * 16, "no number"),
        (None, 16, b"\0" * 8, "should have 16 bytes and 8 are left"),
        (None, 16, b"\0" * 24, "8 bytes follow the last tensor"),
        (None, 12, b"\0" * 12, "takes 16"),
    ],
)
def test_binary_tensors_that_are_cut_or_too_long_are_told(server: Server, length, size, data, words):
    inputs = [
        {"name": n, "shape": [1, 2], "datatype": "INT64", "parameters": {"binary_data_size": size}}
        for n in ("input_ids",)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": length or str(len(head))}
    status, error = refused(server, "/v2/models/text/infer", head + data, headers)
    assert status == 400
    assert words in error


def test_pictures_that_are_bombs_or_odd_are_refused_or_decoded(server: Server):
    def embedded(data: bytes) -> list[float]:
        body = {"image": base64.b64encode(data).decode()}
        return [round(x, 2) for x in asked_json(server, "POST", "/v1/embed", body)["embeddings"][0]]

    status, error = refused(server, "/v1/embed", bomb(), {"Content-Type": "image/png"})
    assert (status, "more than 100000000" in error) == (400, True)
    for bad in (b"", b"GIF89a", picture(COLOURS["red"])[:40]):
        assert refused(server, "/v1/embed", bad, {"Content-Type": "image/png"})[0] == 400
    assert refused(server, "/v1/embed", b'{"image": "no base64!"}')[0] == 400

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    red = Image.new("RGB", (6, 6), (255, 0, 0))
    green = Image.new("RGB", (6, 6), (0, 255, 0))
    assert embedded(saved(red, "GIF", save_all=True, append_images=[green])) == [1, 0, 0]
    assert embedded(saved(red.convert("CMYK"), "TIFF")) == [1, 0, 0]
    grey = Image.frombytes("I;16", (6, 6), struct.pack("<36H", *[65535] * 36))
    assert embedded(saved(grey, "PNG")) == [1, 1, 1]


def form(*parts: bytes) -> bytes:
    return b"".join(b"--x\r\nContent-Disposition: " + part + b"\r\n" for part in parts) + b"--x--\r\n"


_KIND = "multipart/form-data; boundary=x"
_TEXT_FIELD = b'form-data; name="text"\r\n\r\n'
_FILE_FIELD = b'form-data; name="image"; filename="a"\r\n\r\n'


@pytest.mark.parametrize("path", ["/v1/search", "/v1/embed"])
@pytest.mark.parametrize(
    ("kind", "body", "status", "words"),
    [
        ("multipart/form-data", form(_TEXT_FIELD + b"red"), 400, "names no boundary; let the client"),
        (_KIND, form(_TEXT_FIELD + b"a" * 1_100_000), 413, "over 1048576 bytes; send files as 'image'"),
        (_KIND, form(*[_TEXT_FIELD + b"a"] * 65), 413, "over 64 files or text fields; send several"),
        (_KIND, form(*[_FILE_FIELD + b"a"] * 65), 413, "over 64 files or text fields; send several"),
        (_KIND, form(b"form-data\r\n\r\nred"), 400, "has no name; call it"),
        (_KIND, b"no form at all", 400, "no multipart form; send one as"),
        (_KIND, form(b'form-data; name="image"\r\n\r\nred'), 400, "send files as 'image'"),
        (_KIND, form(b'form-data; name="odd"\r\n\r\nred'), 400, ";"),
    ],
)
def test_forms_that_are_none_or_too_large_are_told_what_to_do(server, path, kind, body, status, words):
    found, error = refused(server, path, body, {"Content-Type": kind})
    assert found == status
    assert words in error


def test_a_text_that_would_hold_up_others_is_refused_at_once(server: Server):
    long = {**TEXT, "data": ["a " * 1_000_000]}
    body = json.dumps({"inputs": [long], "parameters": {"timeout": 100_000}}).encode()
    began = time.monotonic()
    status, error = refused(server, "/v2/models/embed_text/infer", body)
    assert (status, "over the limit of 40960" in error) == (413, True)
    assert time.monotonic() - began < 1
    assert refused(server, "/v1/embed", json.dumps({"texts": ["red", "a" * 50_000]}).encode())[0] == 413


@pytest.mark.parametrize("way", ["GZIP", "Deflate", " gzip "])
def test_names_of_encodings_are_read_in_any_case(server: Server, way: str):
    body = json.dumps({"inputs": [TEXT]}).encode()
    packed = gzip.compress(body) if "gzip" in way.lower() else zlib.compress(body)
    headers = {"Content-Encoding": way}
    assert asked(server, "POST", "/v2/models/embed_text/infer", packed, headers)[0] == 200


@pytest.mark.parametrize("path", ["/v1/search", "/v1/embed"])
def test_a_compressed_body_is_told_where_none_is_taken(server: Server, path: str):
    body = gzip.compress(b'{"text": "red"}')
    status, headers, answer = asked(server, "POST", path, body, {"Content-Encoding": "gzip"})
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert "send it as it is" in json.loads(answer)["error"]


def test_an_encoding_that_is_not_known_is_told_with_those_that_are(server: Server):
    status, headers, body = asked(
        server, "POST", "/v2/models/embed_text/infer", b"{}", {"Content-Encoding": "br"}
    )
    assert (status, headers["accept-encoding"]) == (415, "gzip, deflate")
    assert "use gzip or deflate" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("accepted", "way"),
    [
        ("gzip", "gzip"), ("GZip;q=0.5", "gzip"), ("deflate, gzip;q=0", "deflate"), ("gzip; q=0.000", None),
        ("gzip;q=0, deflate;q=0", None), ("br", None), ("identity", None), ("gzip;q=0.01", "gzip"),
    ],
)  # fmt: skip
def test_an_answer_is_compressed_only_as_the_caller_wants_it(server: Server, accepted, way):
    body = json.dumps({"id": "x" * 2000, "inputs": [TEXT]}).encode()
    headers = {"Accept-Encoding": accepted}
    status, found, answer = asked(server, "POST", "/v2/models/embed_text/infer", body, headers)
    assert (status, found.get("content-encoding")) == (200, way)
    unpacked: dict[str | None, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "deflate": zlib.decompress,
    }
    plain = unpacked.get(way, bytes)(answer)
    assert json.loads(plain)["outputs"][0]["shape"] == [1, 3]
