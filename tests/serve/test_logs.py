"""The log is one JSON object a line, whoever speaks."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

from edgeglm.serve.library_logs import libraries_logged
from edgeglm.serve.logs import Log
from tests.serve.asking import raw
from tests.serve.conftest import running


def test_a_route_that_fails_midway_and_a_warning_are_lines_of_json_too(bundles: Path, tmp_path: Path):
    command = ["tests.serve.faults_server", str(bundles / "colours"), "4", "0.0", "100000"]
    with running(tmp_path / "log", command) as server:
        answer = raw(server, f"GET /broken HTTP/1.1\r\nHost: {server.address}\r\n\r\n".encode(), silence=15)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"a beginning" in answer
        assert not answer.endswith(b"0\r\n\r\n")  # cut, and not ended as if it were whole
        told = server.logged(lambda event: event.get("logger") == "uvicorn.error")
        assert (told["level"], told["event"]) == ("error", "library")
        assert told["error"].startswith("ValueError: broken \\udc80")
        assert any("in parts" in line for line in told["trace"])
        warned = server.logged(lambda event: event.get("logger") == "py.warnings")
        assert (warned["level"], "an odd thing" in warned["message"]) == ("warning", True)
        request = server.logged(lambda event: event.get("path") == "/broken")
        assert (request["level"], request["status"]) == ("error", 200)
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(json.loads(line)["event"] for line in lines)


def test_what_libraries_log_is_ours_only_while_it_is_asked_for():
    written = io.BytesIO()
    with Log(written) as log:
        with libraries_logged(log):
            logging.getLogger("a.library").warning("it has %d parts", 3)
            logging.getLogger("a.library").info("nobody needs this")
            odd = logging.LogRecord("a.library", logging.WARNING, "", 0, "%d", ("no number",), None)
            logging.getLogger().handlers[-1].handle(odd)
        logging.getLogger("a.library").warning("not for the log")
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("a.library", "warning"),
        ("a.library", "error"),
    ]
    assert [line["message"] for line in lines] == ["it has 3 parts", "TypeError"]
