"""An ONNX Runtime session with its inputs and outputs bound to memory of the device it runs on.

Without binding each call allocates device memory for what it is fed, and ONNX Runtime chooses where outputs
go. Source: ONNX Runtime, "I/O Binding" (its performance pages), and the Python API of ``IOBinding``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from edgeglm.engines.protocol import Array, Feeds

Memory = Literal["cpu", "cuda"]

_KEPT = 32  # buffers: batches of every size and length would pile up


def memory_of(provider: str) -> Memory:
    """Return where a provider's tensors lie."""
    return "cuda" if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"


class BoundSession:
    """Runs a session through one binding. For one call at a time.

    Args:
        session: An ``onnxruntime.InferenceSession``.
        value: The class ``onnxruntime.OrtValue``.
        outputs: Names of the outputs, in order.
        memory: Where inputs and outputs lie during a call.
    """

    def __init__(self, session: Any, value: Any, outputs: Sequence[str], memory: Memory) -> None:
        self._session, self._value, self._outputs, self._memory = session, value, tuple(outputs), memory
        self._binding = session.io_binding()
        self._buffers: OrderedDict[tuple[str, tuple[int, ...]], Any] = OrderedDict()

    def run(self, feeds: Feeds) -> list[Array]:
        """Return the outputs, in order, in arrays of their own. Raises what the session raises."""
        binding = self._binding
        for name, array in feeds.items():
            buffer = self._buffer(name, array)
            buffer.update_inplace(np.ascontiguousarray(array))
            binding.bind_ortvalue_input(name, buffer)
        binding.clear_binding_outputs()  # their shapes are those of the call before
        for name in self._outputs:
            binding.bind_output(name, self._memory, 0)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        outputs: list[Array] = binding.copy_outputs_to_cpu()
        binding.clear_binding_inputs()  # or a buffer that is no longer kept would stay
        return outputs

    def _buffer(self, name: str, array: Array) -> Any:
        """Return memory of the array's shape; never the array's own, which belongs to the caller."""
        key = (name, array.shape)
        buffer = self._buffers.pop(key, None)
        if buffer is None:
            if len(self._buffers) >= _KEPT:
                self._buffers.popitem(last=False)
            shape = list(array.shape)
            buffer = self._value.ortvalue_from_shape_and_type(shape, array.dtype.type, self._memory, 0)
        self._buffers[key] = buffer
        return buffer
