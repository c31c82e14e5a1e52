"""Requests of the server's benchmark, written beforehand."""

from __future__ import annotations

import json

import numpy as np

BODIES = 64
TOGETHER = 8  # h2loads at a time, each with a body of its own; every round takes the next ones
"""How many different requests are asked with: no answer is found by what another one left."""


def id_lists() -> list[list[int]]:
    """The ids of ``BODIES`` texts of eight tokens, the same in each run."""
    drawn: list[list[int]] = np.random.default_rng(0).integers(1, 100, (BODIES, 8)).tolist()
    return drawn


def http_request(address: str, path: str, body: bytes, headers: str = "") -> bytes:
    """Write a request."""
    head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def v2_json(ids: list[int]) -> bytes:
    """The protocol's request in JSON."""
    tensors = [
        {"name": name, "shape": [1, len(ids)], "datatype": "INT64", "data": data}
        for name, data in (("input_ids", ids), ("attention_mask", [1] * len(ids)))
    ]
    return json.dumps({"inputs": tensors}).encode()


def v2_binary(ids: list[int]) -> tuple[bytes, int]:
    """The protocol's request with binary tensors both ways, and the length of its JSON."""
    blobs = [np.array(values, np.int64).tobytes() for values in (ids, [1] * len(ids))]
    tensors = [
        {
            "name": name,
            "shape": [1, len(ids)],
            "datatype": "INT64",
            "parameters": {"binary_data_size": len(blob)},
        }
        for name, blob in zip(("input_ids", "attention_mask"), blobs, strict=True)
    ]
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return head + b"".join(blobs), len(head)


def v2_grpc(ids: list[int]) -> bytes:
    """The protocol's request as a message."""
    from edgeglm.serve.grpc_messages import message

    request = message("ModelInferRequest")(model_name="text")
    for name, values in (("input_ids", ids), ("attention_mask", [1] * len(ids))):
        request.inputs.add(name=name, datatype="INT64", shape=[1, len(ids)])
        request.raw_input_contents.append(np.array(values, np.int64).tobytes())
    return bytes(request.SerializeToString())
