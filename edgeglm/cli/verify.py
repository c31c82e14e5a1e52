"""`edgeglm verify`: whether a bundle is what was built, and does here what it did there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, bundle_argument, json_option, trust_options
from edgeglm.core.errors import GateError
from edgeglm.core.words import human_bytes

if TYPE_CHECKING:
    from edgeglm.bundle.goldens import GoldenResult
    from edgeglm.bundle.trust import Trust


@click.command(name="verify")
@bundle_argument
@click.option("--run", "run_goldens", is_flag=True, help="Run the golden inputs through every variant too.")
@trust_options
@json_option
@click.pass_obj
def command(app: App, bundle: Path, run_goldens: bool) -> None:
    """Hold every byte of BUNDLE against its digests and them against its signatures.

    Exits with 2 at the first that differs, or when no trusted key signed where one is asked for.

    With --run, exits with 3 when a variant gives other outputs on this machine than it gave
    where the bundle was made.
    """
    from edgeglm.bundle.verify import verify_report

    result = verify_report(bundle, trust=app.trust())
    size = human_bytes(result.size)
    app.print(f"{result.path}: intact; {result.files} files, {size}, in {result.seconds:.1f} s")
    app.print(f"content digest {result.content_digest}")
    app.print(result.signature)
    checks = _golden_checks(bundle, app.trust()) if run_goldens else []
    for check in checks:
        app.print(
            f"{check.variant}: worst cosine {check.image_cosine_min:.5f} over {check.images} pictures, "
            f"{check.text_cosine_min:.5f} over {check.texts} texts; "
            f"top {check.top_k} agree to {check.top_k_agreement:.0%}"
        )
    app.emit({"verified": result, "goldens": checks})
    if failed := [check.variant for check in checks if not check.agrees()]:
        raise GateError(
            f"golden outputs differ on this machine for {', '.join(failed)}; "
            "use another variant (edgeglm run --variant) or build the bundle again"
        )


def _golden_checks(path: Path, trust: Trust) -> list[GoldenResult]:
    from edgeglm.bundle.goldens import golden_check
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.runtime.retrieval import Retriever

    results = []
    with open_bundle(path, verify=False, trust=trust) as bundle:
        for variant in bundle.manifest.variants:
            with Retriever(bundle, variant=variant.name) as retriever:
                results.append(
                    golden_check(bundle, retriever.embed_images, retriever.embed_text, variant=variant.name)
                )
    return results
