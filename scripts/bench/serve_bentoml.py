"""A text tower behind BentoML, for the server's benchmark; runs in BentoML's environment.

TEXT_TOWER=TEXT.onnx PEER/bin/bentoml serve serve_bentoml:TextTower --port PORT, in this folder.
"""

from __future__ import annotations

import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(
    workers=1,
    traffic={"concurrency": 1024, "timeout": 30},
    logging={"access": {"enabled": False}},
)
class TextTower:
    """Embeds ids, in batches."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["TEXT_TOWER"], options, providers=["CPUExecutionProvider"]
        )

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=10_000)
    def embed(self, input_ids: np.ndarray) -> np.ndarray:
        """Return the embeddings of a batch."""
        ids = input_ids.astype(np.int64)
        return self.session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
