"""The ONNX Runtime backend: any CPU, and any provider that proves that it works."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from edgeglm.core.errors import UserError, unknown_name
from edgeglm.engines.onnxruntime_binding import BoundSession, memory_of
from edgeglm.engines.onnxruntime_providers import TENSORRT, Provider, engine_cache, with_options
from edgeglm.engines.protocol import Array, Engine, Feeds, TensorSpec

Optimization = Literal["none", "basic", "extended", "all"]

_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
_LOG_ERRORS_ONLY = 3
#: What to do about some of what ONNX Runtime says when it loads a file.
_REMEDIES = {"same node name": "give each node a name of its own"}


class OnnxRuntimeEngine(Engine):
    """One ONNX file in one session. ``infer`` may be called from several threads.

    Args:
        path: The ONNX file.
        threads: Threads inside an operator. Operators run one after another.
        providers: Execution providers, the preferred first, each by name or as (name, options). The first
            one must truly load: ONNX Runtime would fall back without a word, this raises UserError.
            TensorRT's without options keeps the engines it builds in the user's cache folder.
        optimization: Graph optimisation level.
        spinning: Whether idle threads spin for a while: quicker calls, at other processes' cost.
        integers: Whether products between Q/DQ run in integer kernels. Without, they are computed as they
            are written, which is what TensorRT's exact sums give on any machine.
        io_binding: Whether inputs and outputs are bound to memory of the provider's device, which is kept
            from call to call; calls then wait for each other. Not unless asked for: on an H200 bound calls
            of small towers took 8 to 21 % longer than plain ones (docs/runner.md).
        name: What errors call it; the file's name if None.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 2,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
        optimization: Optimization = "all",
        spinning: bool = True,
        integers: bool = True,
        io_binding: bool = False,
        name: str | None = None,
    ) -> None:
        given: object = threads  # whatever a caller without types may give
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise UserError(f"threads is {given!r}; give a whole number of at least 1")
        if optimization not in _LEVELS:
            raise unknown_name("optimisation level", optimization, _LEVELS)
        self.path = Path(path)
        self.name = name or self.path.name
        self.threads = threads
        self._options = with_options(providers)
        self.providers = tuple(self._options)
        self.optimization = optimization
        self.spinning = spinning
        self.integers = integers
        self.io_binding = io_binding
        self._bound: BoundSession | None = None
        self._session: Any = None
        self._inputs: tuple[TensorSpec, ...] = ()
        self._outputs: tuple[TensorSpec, ...] = ()
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``infer`` takes. Known once loaded."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``infer`` gives. Known once loaded."""
        return self._outputs

    def load(self) -> None:
        """Open the session. Raises UserError when the file or a provider cannot be used."""
        with self._lock:
            if self._session is None:
                session = self._opened()
                self._inputs = tuple(_spec(node) for node in session.get_inputs())
                self._outputs = tuple(_spec(node) for node in session.get_outputs())
                if self.io_binding:
                    names = [spec.name for spec in self._outputs]
                    value = _onnxruntime().OrtValue
                    self._bound = BoundSession(session, value, names, memory_of(self.providers[0]))
                self._session = session

    def close(self) -> None:
        """Drop the session and its memory."""
        with self._lock:
            self._session = self._bound = None

    def _run(self, feeds: Feeds) -> list[Array]:
        if self.io_binding:
            with self._lock:
                if self._bound is None:
                    raise self._closed_meanwhile()
                return self._bound.run(feeds)
        session = self._session
        if session is None:
            raise self._closed_meanwhile()
        outputs: list[Array] = session.run(None, dict(feeds))
        return outputs

    def _closed_meanwhile(self) -> UserError:
        return UserError(f"{self.name} was closed during a call; open it again")

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Return ``{output name: array}`` for one batch. Raises UserError for feeds that do not fit."""
        if self._session is None:
            raise UserError(f"{self.name} is not loaded; open it in a 'with' statement")
        return super().infer(feeds)

    def _opened(self) -> Any:
        runtime = _onnxruntime()
        available = runtime.get_available_providers()
        for provider in self.providers:
            if provider not in available:
                raise unknown_name("ONNX Runtime provider", provider, available)
        if not self.path.is_file():
            raise UserError(f"no ONNX file at {self.path}; give the path of a model")
        _require_utf8(self.path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _LOG_ERRORS_ONLY
        options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[self.optimization])
        if not self.spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not self.integers:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        chosen = [
            (name, engine_cache(self.path, runtime.__version__) if name == TENSORRT and not given else given)
            for name, given in self._options.items()
        ]
        try:
            session = runtime.InferenceSession(str(self.path), options, providers=chosen)
        except Exception as error:  # its exceptions share no base of their own
            reason = str(error).strip().splitlines()[0]
            remedy = next(
                (cure for said, cure in _REMEDIES.items() if said in reason), "export the model again"
            )
            raise UserError(f"ONNX Runtime cannot load {self.path}: {reason}; {remedy}") from error
        if self.providers[0] not in session.get_providers():
            raise UserError(
                f"{self.providers[0]} does not work on this machine; "
                "run 'edgeglm doctor', or use CPUExecutionProvider"
            )
        return session


def _require_utf8(path: Path) -> None:
    """Raise UserError for a path that Python opens and C++ cannot be told."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "replace")
        raise UserError(
            f"the path {shown} is not UTF-8, and ONNX Runtime opens no such file; "
            "move it into a folder whose name is UTF-8"
        ) from None


def _spec(node: Any) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise UserError(f"{node.name} has the type {node.type}; export it as one of {', '.join(_DTYPES)}")
    return TensorSpec(name=node.name, dtype=dtype, shape=tuple(node.shape))


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"cannot import onnxruntime ({error}); pip install 'edgeglm[device]'") from error
    return onnxruntime
