"""The bill of materials of a bundle, in CycloneDX 1.6 with its machine-learning parts (ML-BOM).

Source: the CycloneDX 1.6 JSON schema, ``machine-learning-model`` and ``modelCard``. It is made from
the manifest alone, so the same bundle gives the same bytes, and it is listed in the manifest, so a
signature covers it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from edgeglm.bundle.manifest import FileRecord, Manifest, TensorRecord, VariantRecord

BOM_NAME = "bom.cdx.json"

_NAMESPACE = uuid.UUID("6f0b1b5a-6a9e-5d0c-9a1c-3f6f1f7f2b10")


def bom_bytes(manifest: Manifest, files: Mapping[str, FileRecord]) -> bytes:
    """Return the bill of materials for a manifest and the files that the bundle will hold."""
    digests = {name: record.sha256 for name, record in sorted(files.items())}
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, json.dumps(digests))}",
        "version": 1,
        "metadata": {
            **({"timestamp": manifest.created} if "T" in manifest.created else {}),
            "tools": {
                "components": [{"type": "application", "name": "edgeglm", "version": manifest.edgeglm}]
            },
            "component": {
                "type": "application",
                "bom-ref": "bundle",
                "name": manifest.name,
                "properties": [{"name": "edgeglm:target", "value": manifest.target.name}],
            },
        },
        "components": [
            *(component for variant in manifest.variants for component in _models(manifest, variant, files)),
            *(_data(licence.name, licence.version, licence.licence, licence.attribution, licence.url)
              for licence in manifest.licences),
        ],
        "dependencies": [
            {
                "ref": "bundle",
                "dependsOn": [
                    f"{variant.name}/{tower}"
                    for variant in manifest.variants
                    for tower in sorted(variant.files)
                ],
            }
        ],
    }  # fmt: skip
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _models(
    manifest: Manifest, variant: VariantRecord, files: Mapping[str, FileRecord]
) -> list[dict[str, Any]]:
    components = []
    for tower, name in sorted(variant.files.items()):
        record = manifest.towers[tower]
        components.append(
            {
                "type": "machine-learning-model",
                "bom-ref": f"{variant.name}/{tower}",
                "name": f"{manifest.name} {tower} tower, {variant.name}",
                "hashes": [{"alg": "SHA-256", "content": files[name].sha256}],
                "properties": [
                    {"name": "edgeglm:file", "value": name},
                    {"name": "edgeglm:gate", "value": variant.gate},
                    {"name": "edgeglm:parameters", "value": str(record.parameters)},
                ],
                "modelCard": {
                    "modelParameters": {
                        "task": "cross-modal retrieval",
                        "inputs": [_tensor(tensor) for tensor in record.inputs],
                        "outputs": [_tensor(tensor) for tensor in record.outputs],
                    },
                    "quantitativeAnalysis": {"performanceMetrics": _metrics(variant)},
                },
            }
        )
    return components


def _tensor(tensor: TensorRecord) -> dict[str, str]:
    return {"format": f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"}


def _metrics(variant: VariantRecord) -> list[dict[str, str]]:
    found = []
    for track, measured in sorted(variant.metrics.items()):
        value = measured.get("map10") if isinstance(measured, dict) else None
        value = value.get("value") if isinstance(value, dict) else value
        if isinstance(value, (int, float)):
            found.append({"type": "mAP@10", "value": f"{value:.6f}", "slice": track})
    return found


def _data(name: str, version: str, licence: str, attribution: str, url: str | None) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data/{name}@{version}",
        "name": name,
        "version": version,
        # As written by the source: it need not be an SPDX identifier.
        "licenses": [{"license": {"name": licence}}],
        "copyright": attribution,
    }
    if url:
        component["externalReferences"] = [{"type": "website", "url": url}]
    return component
