"""`edgeglm serve`: a bundle behind HTTP and gRPC."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options

if TYPE_CHECKING:
    from edgeglm.serve.config import ServeConfig
    from edgeglm.serve.server import Serving
    from edgeglm.serve.service import SearcherMaker

_PATH = click.Path(path_type=Path)
TOKEN_VARIABLE = "EDGEGLM_TOKEN"
_LATE = ("onnxruntime", "tokenizers", "PIL.Image", "uvloop", "uvicorn.protocols.http.httptools_impl")


@click.command(name="serve")
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="HTTP port; 0 for a free one.")
@click.option("--grpc-port", default=8001, show_default=True, help="gRPC port; 0 for a free one.")
@click.option("--no-grpc", is_flag=True, help="Serve HTTP only.")
@click.option(
    "--token-file", type=_PATH, help=f"File with the bearer token; {TOKEN_VARIABLE} is read without it."
)
@click.option("--tls-certificate", type=_PATH, help="Certificate chain in PEM.")
@click.option("--tls-key", type=_PATH, help="Its private key in PEM.")
@click.option("--host-name", multiple=True, help="Another name by which callers reach the server.")
@click.option("--index", type=_PATH, help="An index to search, in place of the bundle's gallery.")
@click.option("--no-page", is_flag=True, help="Serve no search page at /.")
@click.option("--bundles", type=_PATH, help="Folder of bundles that may be loaded by name.")
@click.option("--control", is_flag=True, help="Let callers load and unload models.")
@click.option("--variant", help="Which variant; by default what finalize chose.")
@click.option(
    "--instances", default=1, show_default=True, type=click.IntRange(1, 64), help="Engines a tower."
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 256), help="An operator's.")
@click.option(
    "--queue", default=256, show_default=True, type=click.IntRange(min=1), help="Rows held; then 429."
)
@click.option("--max-batch", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--delay-us", default=0, show_default=True, type=click.IntRange(min=0), help="Queue delay.")
@click.option("--max-body-mb", default=32.0, show_default=True, help="Limit of a request's body.")
@click.option("--max-rows", default=64, show_default=True, help="Limit of a request's rows.")
@click.option("--max-requests", default=1024, show_default=True, help="Limit of requests at a time.")
@click.option("--drain-seconds", default=30.0, show_default=True, help="What SIGTERM leaves to requests.")
@click.option("--no-access-log", is_flag=True, help="Log events and errors only.")
@click.option("--traces", is_flag=True, help="Send spans to OpenTelemetry, as OTEL_* variables say.")
@click.option("--when-told", is_flag=True, help="Import everything, then wait for a line on stdin.")
@trust_options
@json_option
@click.pass_obj
def command(
    app: App,
    bundle: Path,
    host: str,
    port: int,
    grpc_port: int,
    no_grpc: bool,
    token_file: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    host_name: tuple[str, ...],
    index: Path | None,
    no_page: bool,
    bundles: Path | None,
    control: bool,
    variant: str | None,
    instances: int,
    threads: int,
    queue: int,
    max_batch: int,
    delay_us: int,
    max_body_mb: float,
    max_rows: int,
    max_requests: int,
    drain_seconds: float,
    no_access_log: bool,
    traces: bool,
    when_told: bool,
) -> None:
    """Serve BUNDLE over HTTP and gRPC, until SIGTERM.

    Speaks the Open Inference Protocol, so that Triton's clients work as they are, and plain JSON. Listens on
    loopback unless told otherwise; set a token before you tell.
    """
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.runtime.batch_queue import BatchPolicy
    from edgeglm.runtime.config import RunnerConfig
    from edgeglm.serve import page_routes
    from edgeglm.serve.config import ServeConfig, bytes_of, token_from
    from edgeglm.serve.server import serve

    config = ServeConfig(
        host=host,
        port=port,
        grpc_port=None if no_grpc else grpc_port,
        token=token_from(token_file, os.environ.get(TOKEN_VARIABLE)),
        certificate=tls_certificate,
        key=tls_key,
        hosts=host_name,
        bundles=bundles,
        control=control,
        max_body=bytes_of(max_body_mb, "--max-body-mb"),
        max_rows=max_rows,
        max_requests=max_requests,
        drain_timeout=drain_seconds,
        access_log=not no_access_log,
        traces=traces,
        runner=RunnerConfig(
            variant=variant,
            instances=instances,
            threads=threads,
            capacity=queue,
            when_full="shed",
            drain_timeout=drain_seconds,
            batching=BatchPolicy(max_batch_size=max_batch, max_queue_delay_microseconds=delay_us),
        ),
    )
    if when_told and not _told():
        return
    trust = app.trust()
    serve(
        bundle,
        config,
        opened=lambda path: open_bundle(path, trust=trust),
        searcher=None if index is None else _index_searcher(index),
        routes=() if no_page else (page_routes.routes,),
        open_paths=() if no_page else page_routes.OPEN_PATHS,
        notes=_dangers(config),
        serving=lambda where: _say(app, where),
    )


def _dangers(config: ServeConfig) -> list[str]:
    """Say what an address beyond loopback lays open."""
    if config.loopback:
        return []
    if config.token is None:
        return [f"anyone who reaches {config.host} may ask this server; set a token in {TOKEN_VARIABLE}"]
    if config.certificate is None:
        return [f"the token reaches {config.host} in plain text; give --tls-certificate and --tls-key"]
    return []


def _told() -> bool:
    """Import what comes late, then wait: nothing of the bundle has been opened. False at the end of stdin."""
    for name in _LATE:
        with suppress(ImportError):  # whoever needs it says so better
            importlib.import_module(name)
    return bool(sys.stdin.buffer.readline())


def _index_searcher(index: Path) -> SearcherMaker:
    from edgeglm.serve.index_searcher import IndexSearcher

    return lambda bundle, variant: IndexSearcher(index, bundle, variant)


def _say(app: App, where: Serving) -> None:
    identity = where.service.identity
    if not app.json:  # without rich, which would take longer to import than the first answers do
        grpc = f", gRPC {where.grpc}" if where.grpc else ""
        click.echo(f"{identity.bundle} {identity.precision} on {where.http}{grpc}")
    app.emit({"http": where.http, "grpc": where.grpc, "edgeglm": identity.facts})
