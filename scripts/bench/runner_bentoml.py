"""BentoML with a model that does nothing, for the runner's benchmark; runs in BentoML's environment.

PEER/bin/bentoml serve runner_bentoml:NoOp --port PORT, in this folder.
"""

from __future__ import annotations

import bentoml
import numpy as np


@bentoml.service(workers=1, traffic={"concurrency": 1024, "timeout": 30})
class NoOp:
    """Gives back what it gets, in batches."""

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=10_000)
    def predict(self, x: np.ndarray) -> np.ndarray:
        """Compute nothing."""
        return x
