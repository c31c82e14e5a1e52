"""Snapshots of the Hugging Face Hub, through ``huggingface_hub`` and its own settings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgeglm.assets.catalogue import Spec
from edgeglm.core.errors import UserError

# Weights of other frameworks, which nothing here reads.
_IGNORED = ["*.h5", "*.msgpack", "*.ot", "*.tflite", "*.onnx", "onnx/*", "openvino/*", "coreml/*", "*.gguf"]


def fill_from_hub(spec: Spec, folder: Path) -> dict[str, Any]:
    """Download the files of ``hf:owner/name[@revision]`` into ``folder``; return what to record.

    Raises UserError where the library is absent, the repository is unknown, or there is no network.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError as error:
        raise UserError(f"{spec} needs huggingface_hub; pip install 'edgeglm[build]'") from error
    try:
        snapshot_download(
            spec.name, revision=spec.version or None, local_dir=folder, ignore_patterns=_IGNORED
        )
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the hub refuses {spec}: {reason}; check the name and the revision") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
        raise UserError(
            f"cannot reach the hub for {spec}; check the network, "
            "or download the model elsewhere and give its local folder instead"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"revision": spec.version or "main at the time of fetching"}
