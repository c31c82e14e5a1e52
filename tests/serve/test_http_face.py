"""What callers ask of the HTTP face by its paths, and what every answer says of itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from scripts.fixtures.colours import COLOURS, picture
from tests.serve.asking import IDENTITY, TEXT, asked, asked_json
from tests.serve.conftest import PLAN, Server


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v1/info", "/metrics", "/nothing", "/v1/stats"])
def test_every_answer_says_which_bundle_gave_it_and_carries_the_request_id(server: Server, path: str):
    _, headers, _ = asked(server, "GET", path, headers={"X-Request-Id": "abc-1"})
    assert all(headers[name] for name in IDENTITY)
    assert len(headers["edgeglm-digest"]) == 64
    assert headers["edgeglm-plan"] == hashlib.sha256(PLAN).hexdigest()
    assert headers["x-request-id"] == "abc-1"
    status, headers, _ = asked(server, "POST", "/v2/models/nothing/infer", b"{}")
    assert status == 404
    assert all(headers[name] for name in IDENTITY)
    event = server.logged(lambda event: event.get("id") == headers["x-request-id"])
    assert (event["status"], event["level"]) == (404, "warning")
    assert "unknown model" in event["error"]


def test_every_description_names_the_precision_plan(server: Server):
    plan = hashlib.sha256(PLAN).hexdigest()
    for path in ("/v2", "/v1/info", "/v1/stats", "/v1/search?q=red"):
        assert asked_json(server, "GET", path)["edgeglm"]["plan"] == plan
    assert f'plan="{plan}"' in asked(server, "GET", "/metrics")[2].decode()


def test_an_id_that_would_forge_a_log_line_is_replaced(server: Server):
    _, headers, _ = asked(server, "GET", "/v2", headers={"X-Request-Id": "a b"})
    assert headers["x-request-id"] != "a b"
    _, headers, _ = asked(server, "GET", "/v2", headers={"X-Request-Id": "x" * 129})
    assert len(headers["x-request-id"]) < 40


def test_words_and_pictures_embed_and_search_in_every_plain_way(server: Server):
    found = asked_json(server, "GET", "/v1/search?q=red&k=2")
    assert found["hits"][0]["id"] == "set/red"
    assert found["hits"][0]["score"] == pytest.approx(1)
    assert found["searched"] == {"name": "gallery", "rows": 3, "filters": False}
    assert found["edgeglm"]["precision"] == "fp32"
    status, headers, body = asked(server, "GET", found["hits"][0]["picture"])
    assert (status, headers["content-type"]) == (200, "image/png")
    assert body == picture(COLOURS["red"])
    blue = picture(COLOURS["blue"])
    for content, kind in (
        (blue, "image/png"),
        (json.dumps({"image": base64.b64encode(blue).decode(), "k": 1}).encode(), "application/json"),
        (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
            + blue
            + b"\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
    ):
        status, _, answer = asked(server, "POST", "/v1/search", content, {"Content-Type": kind})
        assert status == 200, answer
        assert json.loads(answer)["hits"][0]["id"] == "set/blue"
    both = asked_json(
        server, "POST", "/v1/embed", {"texts": ["red", "blue"], "image": base64.b64encode(blue).decode()}
    )
    assert [[round(x) for x in row] for row in both["embeddings"]] == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_nothing_that_is_asked_for_in_a_url_or_form_is_passed_over(server: Server):
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + picture(
        COLOURS["red"]
    )
    blue = picture(COLOURS["blue"])
    for path, body, headers, words in (
        ("/v1/search?k=1", b'{"text": "red"}', {}, "'k' in the URL is not read beside such a body"),
        ("/v1/search?k=1", part + b"\r\n--x--\r\n", head, "'k' in the URL"),
        ("/v1/search", (part + b"\r\n") * 2 + b"--x--\r\n", head, "one query, not 2 images"),
        ("/v1/embed?timeout_ms=5", b'{"text": "red"}', {}, "'timeout_ms' in the URL"),
        ("/v1/embed?timeout=5", blue, {"Content-Type": "image/png"}, "'timeout' in the URL is not known"),
    ):
        status, _, answer = asked(server, "POST", path, body, headers)
        assert (status, words in json.loads(answer)["error"]) == (400, True), answer
    for path, status in (("/v1/embed?timeout_ms=60000", 200), ("/v1/embed?timeout_ms=0.000001", 504)):
        assert asked(server, "POST", path, blue, {"Content-Type": "image/png"})[0] == status
    assert asked(server, "HEAD", "/v1/search?q=red")[0] == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/search", 400),
        ("/v1/search?q=red&k=0", 400),
        ("/v1/search?q=red&k=many", 400),
        ("/v1/search?q=red&where=3", 400),
        ("/v1/search?q=red&q=blue", 400),
        ("/v1/search?q=red&text=blue", 400),
        ("/v1/search?q=red&k=1&k=2", 400),
        ("/v1/search?q=red&where=%7B%22a%22%3A1%7D", 400),
        ("/v1/search?q=", 400),
        ("/v1/search?q=%ff", 400),
        ("/v1/search?q=red&where=%ed%a0%80", 400),
        ("/v1/search?q=" + "a" * 50_000, 413),
        ("/v1/pictures/set/red", 200),
        ("/v1/pictures/../../manifest.json", 404),
        ("/v1/pictures/%2e%2e/%2e%2e/manifest.json", 404),
        ("/v1/pictures//etc/passwd", 404),
        ("/v2/models/..%2f..%2fetc", 404),
        ("/v2/models/text/versions/..", 404),
        ("/v2/models/%00", 404),
        ("/v2/repository/index", 405),
    ],
)
def test_paths_lead_nowhere_but_to_what_is_served(server: Server, path: str, status: int):
    found, headers, body = asked(server, "GET", path)
    assert found == status, body
    if status == 200:
        assert headers["x-content-type-options"] == "nosniff"
    else:
        assert json.loads(body)["error"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v2/repository/index", "POST"),
        ("GET", "/v2/models/text/infer", "POST"),
        ("PUT", "/v1/search", "GET or HEAD or POST"),
        ("DELETE", "/v2/models/text", "GET or HEAD"),
        ("POST", "/metrics", "GET or HEAD"),
    ],
)
def test_a_wrong_method_is_told_which_ones_the_path_takes(server: Server, method, path, allowed):
    status, headers, body = asked(server, method, path)
    assert status == 405
    assert sorted(headers["allow"].split(", ")) == allowed.split(" or ")
    assert json.loads(body) == {"error": f"this path does not take that method; use {allowed}"}


def test_metrics_count_batches_answers_and_refusals(server: Server):
    asked(server, "POST", "/v2/models/embed_text/infer", json.dumps({"inputs": [TEXT]}).encode())
    text = asked(server, "GET", "/metrics")[2].decode()
    for line in (
        r'edgeglm_bundle_info{.*digest="[0-9a-f]{64}".*} 1.0',
        r'edgeglm_requests_total{method="POST",route="/v2/models/infer",status="200"} \d',
        r'edgeglm_batch_size_bucket{le="1",tower="text"} \d',
        r'edgeglm_request_seconds_count{face="http",route="/v2/models/infer"} \d',
        r"edgeglm_queue_depth 0.0",
        r"edgeglm_engine_instances 1.0",
        r'edgeglm_shed_total{full="queue"} 0.0',
        r'edgeglm_shed_total{full="connections"} 0.0',
        r"edgeglm_deadline_missed_total \d",
        r'edgeglm_stage_seconds_count{stage="engine",tower="text"} \d',
    ):
        assert re.search(line, text), line
