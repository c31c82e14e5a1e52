"""How a server behaves: where it listens, whom it lets in, and how much it takes."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from edgeglm.core.errors import UserError
from edgeglm.runtime.config import RunnerConfig

MIN_TOKEN = 16
_DAY = 86_400.0
_MOST = {
    "max_body": 2**31 - 1,  # gRPC's own bound of a message
    "max_buffered": 2**40,
    "max_rows": 1_000_000,
    "max_requests": 1_000_000,
    "max_connections": 1_000_000,
}


def default_runner_config() -> RunnerConfig:
    """Return the runner's defaults, but shedding: a server refuses what it cannot hold, and says when."""
    return RunnerConfig(when_full="shed", capacity=256)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings of a server.

    Attributes:
        host: The address to listen on; loopback unless told.
        port: HTTP. 0 for one that is free.
        grpc_port: gRPC. 0 for one that is free, None for no gRPC.
        token: What callers must send as ``Authorization: Bearer``; None for nobody asked.
        certificate: TLS chain in PEM, with ``key``; None for plain text.
        key: TLS private key in PEM.
        hosts: Names, besides the address and loopback's, by which callers may address the server. A page of
            another site that had its name point here would send its own.
        bundles: A folder of bundles that may be loaded by name in place of the first; None for none.
        control: Whether callers may load and unload models.
        max_body: Bytes of one request, after decompression too.
        max_buffered: Bytes of all bodies that are held at a time.
        max_rows: Rows of one request.
        max_requests: HTTP requests, and gRPC calls, worked on at a time; more are answered 429.
        max_connections: HTTP connections; more are answered 503.
        body_timeout: Seconds that a caller may take to send a body.
        send_timeout: Seconds that a caller may take to read an answer.
        idle_timeout: Seconds after which a silent HTTP connection is closed.
        drain_timeout: Seconds that requests get to end when the server is told to stop.
        access_log: Whether each request is logged.
        traces: Whether spans go to OpenTelemetry, as its environment variables say.
        runner: How the runner behaves.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    token: str | None = field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    hosts: tuple[str, ...] = ()
    bundles: Path | None = None
    control: bool = False
    max_body: int = 32 << 20
    max_buffered: int = 256 << 20
    max_rows: int = 64
    max_requests: int = 1024
    max_connections: int = 4096
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    idle_timeout: float = 75.0
    drain_timeout: float = 30.0
    access_log: bool = True
    traces: bool = False
    runner: RunnerConfig = field(default_factory=default_runner_config)

    def __post_init__(self) -> None:
        for name in ("port", "grpc_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise UserError(f"{name} is {port}; give 0 to 65535")
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 to {most}")
        if self.max_body > self.max_buffered:
            raise UserError(
                f"one body may take {self.max_body} bytes, but all together {self.max_buffered}; "
                f"lower max_body to that at most"
            )
        for name in ("body_timeout", "send_timeout", "idle_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) <= _DAY:
                raise UserError(f"{name} is {getattr(self, name)}; give seconds above 0 and up to a day")
        if (self.certificate is None) != (self.key is None):
            raise UserError("TLS takes a certificate and a key; give both, or neither")
        for file in (self.certificate, self.key):
            if file is not None and not file.is_file():
                raise UserError(f"there is no file {file}; give the path of a PEM file")
        if self.token is not None and (len(self.token) < MIN_TOKEN or not self.token.isascii()):
            raise UserError(f"the token has under {MIN_TOKEN} ASCII characters; make a longer one")
        if self.certificate is not None and self.key is not None:
            _check_pair(self.certificate, self.key)
        if self.runner.when_full != "shed":
            raise UserError("a server cannot let callers wait for a place; set when_full to 'shed'")
        if self.bundles is not None and not self.bundles.is_dir():
            raise UserError(f"there is no folder {self.bundles}; give a folder of bundles")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def bytes_of(megabytes: float, option: str) -> int:
    """Return megabytes as bytes. Raises UserError for none, or more than a terabyte."""
    if not 1e-6 <= megabytes <= 1e6:
        raise UserError(f"{option} is {megabytes}; give megabytes, such as 32")
    return int(megabytes * 1e6)


def _check_pair(certificate: Path, key: Path) -> None:
    """Raise UserError for a certificate and a key that no TLS server could use."""

    def encrypted() -> str:
        raise UserError(f"{key} is encrypted; write it without a pass phrase, readable by the server alone")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=encrypted)
    except ssl.SSLError as error:
        why = error.reason or error
        raise UserError(
            f"{certificate} and {key} are no certificate and its key: {why}; give both in PEM"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {certificate} or {key}: {error}; make them readable") from None


def token_from(file: Path | None, variable: str | None) -> str | None:
    """Return the bearer token of a file, or of the environment. Raises UserError for a file without one."""
    if file is None:
        return variable or None
    try:
        token = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read a token from {file}: {error}; give a text file") from None
    if not token:
        raise UserError(f"{file} is empty; write the token into it")
    return token
