"""LitServe with a model that does nothing, for the runner's benchmark; runs in LitServe's environment.

PEER/bin/python scripts/bench/runner_litserve.py PORT
"""

from __future__ import annotations

import sys

import litserve


class NoOp(litserve.LitAPI):
    """Gives back what it gets, in batches."""

    def setup(self, device: str) -> None:
        """Load nothing."""

    def decode_request(self, request: dict[str, list[float]]) -> list[float]:
        """Take the numbers."""
        return request["x"]

    def batch(self, inputs: list[list[float]]) -> list[list[float]]:
        """Join nothing."""
        return inputs

    def predict(self, batch: list[list[float]]) -> list[list[float]]:
        """Compute nothing."""
        return batch

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        """Cut nothing."""
        return output

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        """Give the numbers back."""
        return {"y": output}


if __name__ == "__main__":
    api = NoOp(max_batch_size=32, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=1,
        log_level="error",
        generate_client_file=False,
    )
