"""The written description of the HTTP face, and requests made up from it: right ones, and wrong ones."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.progress import QuietProgress
from edgeglm.index.opening import FolderSource, built_index
from edgeglm.serve import operator_routes
from scripts.fixtures.colours import COLOURS, picture
from tests.serve.asking import asked
from tests.serve.conftest import Server, running, serve_command

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis


@pytest.fixture(scope="module")
def fuzzed(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of its own, whose log must hold no error in the end."""
    log = tmp_path_factory.mktemp("fuzzed") / "log"
    with running(log, serve_command(bundles / "colours", "--no-grpc")) as server:
        yield server
        assert not [event for event in server.events() if event["level"] == "error"], server.log.read_text()


@pytest.fixture(scope="module")
def indexed(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same over an index, whose metadata filters reach."""
    folder = tmp_path_factory.mktemp("pictures") / "shop"
    folder.mkdir()
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(picture(colour))
    index = folder.parent / "shop.index"
    with open_bundle(bundles / "colours") as opened:
        source = FolderSource(folder=folder, metadata={"red.png": {"price": 3, "new": True}})
        built_index(opened, source, index, QuietProgress())
    log = folder.parent / "log"
    with running(log, serve_command(bundles / "colours", "--no-grpc", "--index", str(index))) as server:
        yield server
        assert not [event for event in server.events() if event["level"] == "error"], server.log.read_text()


_NOTHING_SENT = ("/v2", "/v2/health/live", "/v2/health/ready", "/v1/info", "/v1/stats", "/metrics")
CANNOT_BE_WRONG = {f"GET {path}" for path in (*_NOTHING_SENT, "/openapi.json", "/v1/pictures/{id}")}
SCHEMA: Any = schemathesis.openapi.from_path(operator_routes.OPENAPI)
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
schemathesis.checks.load_all_checks()
# What is well-formed may still be refused: a tensor that does not fit the model, a word that is no base64.
CHECKS = [
    check
    for check in schemathesis.checks.CHECKS.get_all()
    if check.__name__
    in (
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
    )
]


CASES = [
    pytest.param(operation, mode, id=f"{operation.label}-{mode.value}")
    for operation in OPERATIONS
    for mode in schemathesis.GenerationMode
    if mode is schemathesis.GenerationMode.POSITIVE or operation.label not in CANNOT_BE_WRONG
]


def ask(server: Server, operation: Any, mode: Any, *, examples: int) -> None:
    # the fields of a form are text, whatever they were meant to be
    checks = [c for c in CHECKS if operation.path != "/v1/embed" or c.__name__ != "negative_data_rejection"]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def sent(case: Any) -> None:
        response = case.call_and_validate(base_url=server.http, checks=checks, timeout=20)
        assert response.status_code != 500  # 503 and 504 are honest answers

    sent()


@pytest.mark.parametrize(("operation", "mode"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_no_request_breaks_the_server_or_gets_what_the_description_does_not_say(
    fuzzed: Server, operation: Any, mode: Any
):
    ask(fuzzed, operation, mode, examples=5)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.path == "/v1/search"], ids=lambda one: one.label
)
@pytest.mark.filterwarnings("ignore")
def test_no_filter_breaks_a_server_with_an_index(indexed: Server, operation: Any, mode: Any):
    ask(indexed, operation, mode, examples=20)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(["kind", "bytes", "price", "new", "folder", "other", ""]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["=", "!=", "<", ">=", "~"]), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_a_made_up_filter_finds_or_is_explained(indexed: Server, where: dict[str, Any]):
    status, _, body = asked(
        indexed, "POST", "/v1/search", json.dumps({"text": "red", "where": where}).encode()
    )
    assert status in (200, 400), body
    assert status == 200 or json.loads(body)["error"]


def test_every_described_path_is_served_and_every_served_path_described(server: Server):
    from edgeglm.serve import plain_routes, v2_routes
    from edgeglm.serve.metrics import HttpCounts

    described = set(json.loads(operator_routes.OPENAPI.read_text())["paths"])
    service: Any = None
    routes = [
        *v2_routes.routes(service),
        *plain_routes.routes(service),
        *operator_routes.routes(_Service(), HttpCounts(), HttpCounts()),  # type: ignore[arg-type]
    ]
    served = {re.sub(":[a-z]+}", "}", route.path) for route in routes}
    served = {path for path in served if "/versions/" not in path} - {"/v2/models/stats"}
    assert described - {"/v2/models/{name}/infer"} == served
    assert server.http


class _Service:
    """Stands where routes only keep it."""
