"""A text tower behind LitServe, for the server's benchmark; runs in LitServe's environment.

PEER/bin/python scripts/bench/serve_litserve.py PORT TEXT.onnx
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class TextTower(litserve.LitAPI):
    """Embeds ids, in batches."""

    def setup(self, device: str) -> None:
        """Load the model with one thread."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: dict[str, list[int]]) -> list[int]:
        """Take the ids."""
        return request["input_ids"]

    def batch(self, inputs: list[list[int]]) -> np.ndarray[Any, Any]:
        """Join rows of one length."""
        return np.array(inputs, np.int64)

    def predict(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Run the tower once."""
        found: np.ndarray[Any, Any] = self.session.run(
            None, {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        )[0]
        return found

    def unbatch(self, output: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Cut into rows."""
        return list(output)

    def encode_response(self, output: np.ndarray[Any, Any]) -> dict[str, list[float]]:
        """Give a row as JSON."""
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        TextTower(max_batch_size=32, batch_timeout=0.001), accelerator="cpu", workers_per_device=1
    )
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="error",
        access_log=False,
        generate_client_file=False,
    )
