"""One optimization profile of a plan at work: an execution context, buffers and a CUDA graph of its own.

Switching the profile of a context costs milliseconds, and a graph is good for one context, one shape and the
addresses it was captured with, so all of them are kept (TensorRT Developer Guide, "CUDA Graphs" and
"Execution Context"). A bucket whose profile is a single shape captures it once; one that covers a range
captures a shape that stays, and again when it changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np

from edgeglm.core.errors import EdgeglmError
from edgeglm.engines.cuda_driver import Buffer, CaptureError, Driver
from edgeglm.engines.plan import Shape, ShapeRange, TensorRecord
from edgeglm.engines.profiles import is_fixed
from edgeglm.engines.protocol import Array, Feeds
from edgeglm.engines.trt_runtime import ExecutionContext

Shapes = Mapping[str, Shape]

_STAYS = 8  # calls in a row after which a shape of a range is taken to stay


class Bucket:
    """Runs the calls of one profile, one at a time. All methods want the driver bound.

    Args:
        context: An IExecutionContext that belongs to this bucket alone.
        driver: Opened.
        index: The profile's place in the plan.
        ranges: What the profile covers, by input.
        outputs: What the plan gives.
        dtypes: numpy's name of the dtype of each input and output.
        refusal: Why no CUDA graph may be captured, if none may.

    Raises EdgeglmError where the context does not take the profile or the memory does not suffice.
    """

    def __init__(
        self,
        context: ExecutionContext,
        driver: Driver,
        index: int,
        ranges: Mapping[str, ShapeRange],
        outputs: Sequence[TensorRecord],
        dtypes: Mapping[str, str],
        *,
        refusal: str = "",
    ) -> None:
        self._context: ExecutionContext | None = context
        self._driver = driver
        self._dtypes = dtypes
        self.fixed = is_fixed(ranges)
        self.refusal = refusal
        if not context.set_optimization_profile_async(index, driver.stream):
            raise EdgeglmError(f"profile {index} cannot be set; run 'edgeglm finalize' again")
        self._shapes: Shapes = {}
        self._graph: int | None = None
        self._calls = 0  # at this shape
        self._views: dict[str, Array] = {}
        self._outputs = tuple(record.name for record in outputs)
        largest = {name: range_.max for name, range_ in ranges.items()}
        self._set_shapes(largest)
        sizes = {name: _bytes(shape, dtypes[name]) for name, shape in largest.items()}
        sizes |= {record.name: _bytes(self._shape_of(record.name), record.dtype) for record in outputs}
        self._buffers: dict[str, Buffer] = {}
        for name, size in sizes.items():
            self._buffers[name] = driver.buffer(max(1, size))
            if not context.set_tensor_address(name, self._buffers[name].device):
                raise EdgeglmError(f"{name} cannot be given its memory; run 'edgeglm finalize' again")

    @property
    def captured(self) -> bool:
        """Whether the next call of the same shape launches a graph."""
        return self._graph is not None

    def run(self, feeds: Feeds, shapes: Shapes) -> list[Array]:
        """Return the outputs of one call, in order, in arrays of their own.

        Args:
            feeds: ``{input: array}``; fewer rows than ``shapes`` has are filled up with copies of row 0.
            shapes: ``{input: shape}`` within the profile.

        Raises:
            EdgeglmError: TensorRT or the driver failed.
        """
        if shapes != self._shapes:
            self._reshape(shapes)
        for name, array in feeds.items():
            view = self._views[name]
            if array.shape == view.shape:
                view[...] = array
            else:
                view[: len(array)] = array
                view[len(array) :] = array[:1]
        try:
            if self._graph is not None:
                self._driver.launch(self._graph)
            elif not self._enqueue():
                raise EdgeglmError("TensorRT did not run the engine; run 'edgeglm finalize' again")
            self._driver.synchronize()
        except EdgeglmError:
            with contextlib.suppress(EdgeglmError):  # what is on its way must not meet the next call
                self._driver.synchronize()
            raise
        outputs = [self._views[name].copy() for name in self._outputs]
        self._calls += 1
        if self._graph is None and not self.refusal and self._calls >= (1 if self.fixed else _STAYS):
            self._capture(outputs)
        return outputs

    def close(self) -> None:
        """Drop the graph and the context. The buffers are the driver's."""
        self._forget_graph()
        self._context = None
        self._views.clear()

    def _reshape(self, shapes: Shapes) -> None:
        self._forget_graph()
        self._set_shapes(shapes)
        for name in (*shapes, *self._outputs):
            shape = shapes.get(name) or self._shape_of(name)
            dtype = np.dtype(self._dtypes[name])
            host = self._buffers[name].host[: _bytes(shape, self._dtypes[name])]
            self._views[name] = host.view(dtype).reshape(shape)
        self._shapes, self._calls = dict(shapes), 0

    def _set_shapes(self, shapes: Shapes) -> None:
        for name, shape in shapes.items():
            if not self._opened().set_input_shape(name, shape):
                self._shapes = {}
                raise EdgeglmError(f"TensorRT does not take {name} of shape {shape}; feed a smaller batch")

    def _shape_of(self, output: str) -> Shape:
        sizes = self._opened().get_tensor_shape(output)
        shape = tuple(sizes[axis] for axis in range(len(sizes)))
        if any(size < 0 for size in shape):
            raise EdgeglmError(f"the shape of {output} depends on the data; run this model with ONNX Runtime")
        return shape

    def _enqueue(self) -> bool:
        """Put copies and kernels into the stream."""
        for name in self._shapes:
            self._driver.upload(self._buffers[name], self._views[name].nbytes)
        if not self._opened().execute_async_v3(self._driver.stream):
            return False
        for name in self._outputs:
            self._driver.download(self._buffers[name], self._views[name].nbytes)
        return True

    def _capture(self, outputs: Sequence[Array]) -> None:
        """Capture the call that gave ``outputs``, and keep the graph if it gives them too.

        The shape has run once by then: TensorRT finishes its own preparations in that call.
        """
        can = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX says so beforehand
        if can is not None and not can(self._driver.stream):
            self.refusal = "TensorRT-RTX says that this engine cannot be captured"
            return
        try:
            self._graph = self._driver.captured(self._enqueue)
        except CaptureError as error:
            self.refusal = str(error)
            return
        for name in self._outputs:
            self._views[name].fill(0)
            self._driver.upload(self._buffers[name], self._views[name].nbytes)
        self._driver.launch(self._graph)
        self._driver.synchronize()
        if not all(map(_as_good, outputs, (self._views[name] for name in self._outputs))):
            self._forget_graph()
            self.refusal = "the graph answers otherwise than the call that it was captured from"

    def _opened(self) -> ExecutionContext:
        assert self._context is not None, "the bucket is open"
        return self._context

    def _forget_graph(self) -> None:
        if self._graph is not None:
            self._driver.drop(self._graph)
            self._graph = None


def _as_good(one: Array, other: Array) -> bool:
    """Kernels that add in no fixed order may differ in the last digits."""
    return np.allclose(one, other, rtol=1e-2, atol=1e-3, equal_nan=one.dtype.kind == "f")


def _bytes(shape: Shape, dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
