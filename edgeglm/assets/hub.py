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
    # The client is httpx under some versions of the library and httpx2 under others: what each raises
    # stands above the library's own error.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        snapshot_download(
            spec.name, revision=spec.version or None, local_dir=folder, ignore_patterns=_IGNORED
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = (str(error).strip().splitlines() or [f"status {status}"])[0].rstrip(".;")
        raise UserError(f"the hub refuses {spec}: {reason}; {_remedy(status)}") from error
    except (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        ConnectionError,
        TimeoutError,
        client_error,
    ) as error:
        raise UserError(
            f"cannot reach the hub for {spec}; check the network, "
            "or download the model elsewhere and give its local folder instead"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"revision": spec.version or "main at the time of fetching"}


def _remedy(status: int) -> str:
    if status == 429 or status >= 500:
        return "wait a little, then run the same command again"
    if status in (401, 403):
        return "check the name, or set HF_TOKEN to a token of an account that may read it"
    return "check the name and the revision"
