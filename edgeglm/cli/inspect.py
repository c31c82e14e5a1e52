"""`edgeglm inspect`: what a bundle holds."""

from __future__ import annotations

from pathlib import Path

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options
from edgeglm.core.words import human_bytes


@click.command(name="inspect")
@bundle_argument
@trust_options
@json_option
@click.pass_obj
def command(app: App, bundle: Path) -> None:
    """Show what a bundle holds: variants and their figures, target, stages, licences.

    A bundle's folder is read without hashing its files; `edgeglm verify` does that. Of an .onnx file it
    shows inputs, outputs, operators and precision; `edgeglm fusions` says what runtimes fuse of it.
    """
    if bundle.suffix == ".onnx":
        _onnx(app, bundle)
        return
    from edgeglm.bundle.inspect import inspect_rows
    from edgeglm.bundle.verify import open_bundle

    with open_bundle(bundle, verify=False, trust=app.trust()) as opened:
        sections, tables = inspect_rows(opened)
        for section in sections:
            app.pairs(section.rows, title=section.title)
        for table in tables:
            app.table(table.columns, table.rows, title=table.title)
        app.emit(opened.manifest)


def _onnx(app: App, path: Path) -> None:
    from edgeglm.export.any_onnx import describe_onnx

    found = describe_onnx(path)
    app.pairs(
        [
            ("sha256", found.sha256),
            ("size", human_bytes(found.size_bytes)),
            ("producer", found.producer or "unknown"),
            ("opsets", ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())),
            ("precision", found.precision),
            ("parameters", f"{found.parameters:,}"),
            ("weights in other files", "yes" if found.external_data else "no"),
            *(("input", f"{t.name} {t.dtype} {list(t.shape)}") for t in found.inputs),
            *(("output", f"{t.name} {t.dtype} {list(t.shape)}") for t in found.outputs),
            ("operators", ", ".join(f"{count} {op}" for op, count in found.operators.items())),
        ],
        title=path.name,
    )
    app.emit(found)
