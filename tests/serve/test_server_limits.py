"""Limits and ends of a server: too large, too slow, too many, SIGTERM, TLS, ports in use."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgeglm.cli import main as cli
from tests.serve.asking import IDENTITY, TEXT, asked, asked_json, infer_bytes, raw, refused, shed
from tests.serve.conftest import TOKEN, Server, running, serve_command


def about(path: str, event: dict[str, Any]) -> bool:
    return event.get("path") == path


def hung_up(server: Server, path: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: {server.address}\r\nContent-Length: 99\r\n\r\n"
    return raw(server, head.encode() + b'{"text":', shut=True, silence=15)


def test_a_body_that_is_too_large_too_slow_or_cut_is_not_waited_for(bundles: Path, tmp_path: Path):
    command = ["tests.serve.faults_server", str(bundles / "colours"), "4", "0.0", "100000", "100000"]
    with running(tmp_path / "log", command) as server:
        status, error = refused(server, "/v2/models/embed_text/infer", b" " * 100_001)
        assert (status, "over the limit of 100000" in error) == (413, True)
        inflated = __import__("gzip").compress(b" " * 10_000_000)
        status, error = refused(server, "/v2/models/embed_text/infer", inflated, {"Content-Encoding": "gzip"})
        assert (status, "grows over the limit" in error) == (413, True)
        status, _ = refused(
            server, "/v2/models/embed_text/infer", inflated[:50], {"Content-Encoding": "gzip"}
        )
        assert status in (400, 413)
        cut = infer_bytes(server)[:-5]
        head, _, told = raw(server, cut, silence=15).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(told) == {"error": "the body did not come in time; send it faster"}
        began = time.monotonic()
        assert raw(server, cut, shut=True, silence=15) == b""  # nobody is there to be told
        assert time.monotonic() - began < 10
        for path in ("/v1/search", "/v1/embed"):
            assert hung_up(server, path) == b""
            assert server.logged(partial(about, path))["status"] == 499
        host, _, port = server.address.rpartition(":")
        with closing(socket.create_connection((host, int(port)), timeout=10)) as slow:
            slow.sendall(b"GET /v2 HTTP/1.1\r\nHost: a\r\n")  # and never the end of the head
            with suppress(ConnectionResetError):
                assert slow.recv(100) == b""
        assert asked(server, "GET", "/v2/health/ready")[0] == 200
        assert asked_json(server, "GET", "/v1/stats")["runner"]["held"] == 0
        # all that may be held at a time is free again: no byte of the above is booked still
        status, error = refused(server, "/v2/models/embed_text/infer", b" " * 100_000)
        assert (status, "no inference request" in error) == (400, True)


def test_a_server_whose_runner_refuses_to_go_on_is_neither_ready_nor_live(bundles: Path, tmp_path: Path):
    limits = ["100000", "268435456", "64", "75", "0.2"]
    command = ["tests.serve.faults_server", str(bundles / "colours"), "4", "3.0", *limits]
    with running(tmp_path / "log", command) as server:
        for place in ("/v2/health/live", "/v2/health/ready"):
            assert asked(server, "GET", place)[0] == 200
        asked(server, "POST", "/v2/models/embed_text/infer", json.dumps({"inputs": [TEXT]}).encode())
        for place in ("/v2/health/live", "/v2/health/ready", "/v2/models/embed_text/ready"):
            status, _, told = asked(server, "GET", place)
            assert (status, b"restart the process" in told) == (503, True)
        assert not asked_json(server, "GET", "/v1/stats")["ready"]


def test_a_full_queue_is_answered_429_with_a_time_and_the_accepted_are_served(bundles, tmp_path):
    command = ["tests.serve.faults_server", str(bundles / "colours"), "4", "0.1", "100000"]
    body = json.dumps({"inputs": [TEXT]}).encode()
    with running(tmp_path / "log", command) as server:
        answers: list[tuple[int, dict[str, str]]] = []

        def ask() -> None:
            answers.append(asked(server, "POST", "/v2/models/embed_text/infer", body)[:2])

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 429}
        assert 4 <= statuses.count(200) < 16
        assert all(headers["retry-after"] == "1" for status, headers in answers if status == 429)
        assert shed(server) == {"queue": statuses.count(429)}
        late = json.dumps({"inputs": [TEXT], "parameters": {"timeout": 1000}}).encode()
        status, error = refused(server, "/v2/models/embed_text/infer", late)
        assert (status, "no answer within" in error) == (504, True)
        # over gRPC the same, in a process of its own: the client warns in ways of its own
        code = (
            "import warnings; warnings.simplefilter('ignore')\n"
            "import sys, queue, numpy as np, tritonclient.grpc as g\n"
            "c = g.InferenceServerClient(sys.argv[1]); t = g.InferInput('text', [5], 'BYTES')\n"
            "t.set_data_from_numpy(np.array([b'red'] * 5, dtype=object))\n"
            "try: c.infer('embed_text', [t])\n"
            "except Exception as e: print(e.status())\n"
        )
        found = subprocess.run([sys.executable, "-c", code, server.grpc], capture_output=True, text=True)
        assert "RESOURCE_EXHAUSTED" in found.stdout, found.stderr


def test_sigterm_answers_what_was_accepted_and_takes_no_more(bundles: Path, tmp_path: Path):
    command = ["tests.serve.faults_server", str(bundles / "colours"), "8", "0.3", "100000"]
    answers: list[int] = []
    with running(tmp_path / "log", command) as server:
        body = json.dumps({"inputs": [TEXT]}).encode()

        def ask() -> None:
            answers.append(asked(server, "POST", "/v2/models/embed_text/infer", body)[0])

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.25)
        server.process.terminate()
        for thread in threads:
            thread.join()
        assert server.process.wait(20) == 0
        assert answers == [200, 200, 200]
        assert [event["event"] for event in server.events()[-1:]] == ["stopped"]


def unread(server: Server, request: bytes, times: int) -> socket.socket:
    """A caller who asks, as far as that goes, and reads nothing."""
    host, _, port = server.address.rpartition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host, int(port)))
    connection.settimeout(0.2)
    with suppress(TimeoutError, OSError):
        for _ in range(times):
            connection.sendall(request)
    return connection


def is_cut(connection: socket.socket, seconds: float) -> bool:
    """Say whether the server gives the caller up in time; writing tells, reading would be reading."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            connection.send(b"x")
        except TimeoutError:
            pass
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("way", ["infer", "openapi", "closing"])
def test_a_caller_who_does_not_read_is_cut_off_and_holds_up_nobody(bundles: Path, tmp_path: Path, way: str):
    command = ["tests.serve.faults_server", str(bundles / "colours"), "400", "0.0", "4000000"]
    # 1 s to read, 64 requests at a time
    with ExitStack() as stack, running(tmp_path / "log", command) as server:
        head = f"GET /openapi.json HTTP/1.1\r\nHost: {server.address}\r\n"
        request = {
            "infer": infer_bytes(server) * 20,
            "openapi": f"{head}\r\n".encode() * 20,
            "closing": f"{head}Connection: close\r\n\r\n".encode(),
        }[way]
        times, count = {"infer": (600, 1), "openapi": (15, 70), "closing": (1, 1)}[way]
        callers = [stack.enter_context(unread(server, request, times)) for _ in range(count)]
        began = time.monotonic()
        assert asked(server, "GET", "/v2/health/ready")[0] == 200  # though 70 wait for 64 places
        assert time.monotonic() - began < 15
        assert all(is_cut(caller, 6) for caller in callers)
        assert asked(server, "GET", "/v2")[0] == 200
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 15


def test_a_server_with_too_many_connections_says_so_and_what_it_is(bundles: Path, tmp_path: Path):
    command = ["tests.serve.faults_server", str(bundles / "colours"), "4", "0.0", "100000"]
    with running(tmp_path / "log", command) as server:
        host, _, port = server.address.rpartition(":")
        quiet = [socket.create_connection((host, int(port))) for _ in range(128)]
        status, headers, _ = asked(server, "GET", "/v2")
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert all(headers[name] for name in IDENTITY)
        assert asked(server, "GET", "/v2/health/live")[0] == 200
        for connection in quiet:
            connection.close()
        assert asked(server, "GET", "/v2")[0] == 200
        assert shed(server) == {"connections": 1}


def test_a_server_with_too_many_requests_says_so_and_counts_it(bundles: Path, tmp_path: Path):
    command = [
        "tests.serve.faults_server", str(bundles / "colours"), "64", "1.0", "100000", "20000000", "2",
    ]  # fmt: skip
    body = json.dumps({"inputs": [TEXT]}).encode()
    with running(tmp_path / "log", command) as server:
        answers: list[int] = []

        def ask() -> None:
            answers.append(asked(server, "POST", "/v2/models/embed_text/infer", body)[0])

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(answers) == {200, 429}
        assert shed(server) == {"requests": answers.count(429)}


def test_a_port_in_use_a_bad_token_and_half_a_tls_pair_are_refused(server, bundles, tmp_path, capsys):
    port = server.address.rpartition(":")[2]
    grpc_port = server.grpc.rpartition(":")[2]
    short = tmp_path / "token"
    short.write_text("short")
    for options, words in (
        (["--port", port], "another program listens there; give --port another port"),
        (["--port", "0", "--grpc-port", grpc_port], "give --grpc-port another port"),
    ):
        command = [sys.executable, "-m", "edgeglm.cli.main", "serve", str(bundles / "colours"), *options]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert found.returncode == 2, (options, found.stderr)
        assert words in found.stderr.splitlines()[-1]
    for options, words in (
        (["--port", "70000"], "give 0 to 65535"),
        (["--host", "203.0.113.7", "--port", "0"], "no such address"),
        (["--token-file", str(short)], "make a longer one"),
        (["--token-file", str(tmp_path / "none")], "cannot read a token"),
        (["--tls-key", str(short)], "give both, or neither"),
        (["--bundles", str(tmp_path / "none")], "no folder"),
        (["--max-body-mb", "nan"], "give megabytes"),
        (["--max-body-mb", "inf"], "give megabytes"),
        (["--drain-seconds", "inf"], "drain_timeout is inf; give seconds"),
        (["--max-body-mb", "3000"], "max_body is 3000000000; give 1 to 2147483647"),
        (["--max-body-mb", "300"], "all together 268435456; lower max_body"),
        (["--max-requests", "3000000000"], "max_requests is 3000000000; give 1 to 1000000"),
        (["--max-rows", "0"], "max_rows is 0; give 1 to 1000000"),
        (["--threads", "100000"], "1<=x<=256"),
        (["--instances", "100000"], "1<=x<=64"),
    ):
        assert cli.exit_code(["serve", str(bundles / "colours"), *options]) == 2
        assert words in capsys.readouterr().err


def test_a_token_that_would_travel_in_plain_text_is_told(bundles, capsys, monkeypatch):
    outside = ["serve", str(bundles / "colours"), "--host", "203.0.113.7", "--port", "0"]
    for token, words in (
        (None, "set a token in EDGEGLM_TOKEN"),
        (TOKEN, "in plain text; give --tls-certificate"),
    ):
        if token is not None:
            monkeypatch.setenv("EDGEGLM_TOKEN", token)
        assert cli.exit_code(outside) == 2  # no such address
        assert words in capsys.readouterr().err


def test_tls_serves_both_faces(bundles: Path, tmp_path: Path):
    certificate, key = self_signed(tmp_path)
    options = ("--tls-certificate", str(certificate), "--tls-key", str(key))
    with running(tmp_path / "log", serve_command(bundles / "colours", *options)) as server:
        assert server.http.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        host, _, port = server.address.rpartition(":")
        body = json.dumps({"inputs": [TEXT]})
        with closing(http.client.HTTPSConnection(host, int(port), timeout=20, context=context)) as connection:
            for _ in range(2):
                connection.request("POST", "/v2/models/embed_text/infer", body)
                response = connection.getresponse()
                assert response.status == 200
                response.read()
        code = (
            "import warnings; warnings.simplefilter('ignore')\n"
            "import sys, tritonclient.grpc as g\n"
            "c = g.InferenceServerClient(sys.argv[1], ssl=True, root_certificates=sys.argv[2])\n"
            "print(c.is_server_ready())\n"
        )
        found = subprocess.run(
            [sys.executable, "-c", code, server.grpc, str(certificate)], capture_output=True, text=True
        )
        assert found.stdout == "True\n", found.stderr


def test_tls_files_that_no_server_could_use_are_told_before_anything_listens(bundles, tmp_path, capsys):
    from cryptography.hazmat.primitives import serialization

    certificate, key = self_signed(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    _, other_key = self_signed(other)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no PEM at all")
    locked = tmp_path / "locked.pem"
    loaded: Any = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for first, second, words in (
        (garbage, key, "give both in PEM"),
        (certificate, garbage, "give both in PEM"),
        (certificate, other_key, "give both in PEM"),
        (certificate, locked, "without a pass phrase"),
        (certificate, tmp_path / "none", "no file"),
    ):
        for more in (["--no-grpc"], []):
            options = ["--tls-certificate", str(first), "--tls-key", str(second), "--port", "0", *more]
            assert cli.exit_code(["serve", str(bundles / "colours"), *options]) == 2
            assert words in capsys.readouterr().err


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return folder / "certificate.pem", folder / "key.pem"
