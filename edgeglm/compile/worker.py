"""Builds one engine in a process of its own.

The builder's C++ prints to stdout past every logger, which would break ``--json``; it may abort the
process; and it keeps memory. Apart, its words go into the log, a crash is an error with the file's
name, and the memory comes back. It never outlives its parent: what runs next times engines.
The child answers with one JSON object a line:

    {"phase": "Building engine", "parent": null} | {"step": "Building engine"} | {"done": {...}}
    {"error": "...", "user": true}

The plan, and where the builder gives them the timing cache and the layers, come as files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.bundle.atomic import disk_errors, scratch_folder
from edgeglm.compile.builder import EnginePlan, engine_from_onnx
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.progress import Progress
from edgeglm.engines.libraries import Library
from edgeglm.engines.plan import PlanMetadata, ShapeRange
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.schema import Target

_STOP_SECONDS = 10
_PR_SET_PDEATHSIG = 1


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of ``engine_from_onnx``, as they travel to the child."""

    onnx_path: str
    targets: tuple[Target, ...]
    library: Library
    precision: str
    profiles: tuple[dict[str, ShapeRange], ...]
    options: BuildOptions = BuildOptions()
    variant: str = ""
    tower: str = ""
    timing_cache: str | None = None
    """Path of what an earlier build by the same version of native TensorRT left."""


def engine_built_apart(request: BuildRequest, progress: Progress) -> EnginePlan:
    """Build in a child process; raise what ``engine_from_onnx`` would.

    A child that dies raises EdgeglmError with its last words. Ctrl-C stops the child and is raised.
    """
    with scratch_folder("edgeglm-build-") as folder:
        plan, words = Path(folder) / "plan", Path(folder) / "words"
        name = f"engine {request.variant} {request.tower}".strip()
        with (
            words.open("wb") as sink,
            _child(plan, sink.fileno()) as child,
            progress.task(name, None) as task,
        ):
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once; its exit says so below
                child.stdin.write(msgspec.json.encode(request))
                child.stdin.close()
            answer: dict[str, Any] = {}
            for line in child.stdout:
                answer = msgspec.json.decode(line)
                if "step" in answer:
                    task.advance()
                elif "phase" in answer:
                    task.note(answer["phase"])
            status = child.wait()
        spoken = [f"[builder] {line}" for line in words.read_text("utf-8", "replace").splitlines()]
        if "done" in answer:
            done = answer["done"]
            metadata = msgspec.convert(done["metadata"], PlanMetadata)
            cache, layers = _beside(plan)
            return EnginePlan(
                plan=plan.read_bytes(),
                metadata=metadata,
                log=(*done["log"], *spoken),
                timing_cache=cache.read_bytes() if cache.is_file() else None,
                layers=layers.read_text("utf-8") if layers.is_file() else None,
            )
        if "error" in answer:
            raise (UserError if answer["user"] else EdgeglmError)(answer["error"])
        raise _died(request, status, spoken)


def _beside(plan: Path) -> tuple[Path, Path]:
    """Return where the timing cache and the layers of a plan lie between the two processes."""
    return plan.with_name("timing.cache"), plan.with_name("layers.json")


@contextmanager
def _child(plan: Path, words: int) -> Iterator[subprocess.Popen[bytes]]:
    # A session of its own: Ctrl-C reaches the parent alone, which then stops the child in order.
    child = subprocess.Popen(
        [sys.executable, "-m", "edgeglm.compile.worker", str(plan), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _died(request: BuildRequest, status: int, spoken: list[str]) -> EdgeglmError:
    how = f"exit {status}" if status >= 0 else signal.Signals(-status).name
    last = "; ".join(line.removeprefix("[builder] ").strip() for line in spoken[-3:])
    name = f"{request.variant} {Path(request.onnx_path).name}".strip()
    return EdgeglmError(
        f"the {request.library} builder died ({how}) on {name}{': ' + last if last else ''}; "
        "leave this variant out, or free memory and run the command again"
    )


class _SentTask:
    def __init__(self, send: _Sender) -> None:
        self._send = send

    def advance(self, steps: float = 1) -> None:
        """Tell the parent."""
        self._send({"step": steps})

    def note(self, text: str) -> None:
        """Tell the parent."""
        self._send({"phase": text})


class _Sender:
    """The child's progress, and its way to answer: stdout as it was before the builder got it."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)

    def __call__(self, message: Mapping[str, Any]) -> None:
        self._answers.write(msgspec.json.encode(message) + b"\n")

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[_SentTask]:
        """Open a task that lives in the parent."""
        yield _SentTask(self)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, also by ``kill -9`` (Linux; see prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit(1)


def _main(plan: Path, parent: int) -> int:
    _end_with(parent)
    send = _Sender()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildRequest)
    try:
        engine = engine_from_onnx(
            Path(request.onnx_path),
            targets=request.targets,
            library=request.library,
            precision=request.precision,
            profiles=request.profiles,
            progress=send,
            options=request.options,
            variant=request.variant,
            tower=request.tower,
            timing_cache=Path(request.timing_cache).read_bytes() if request.timing_cache else None,
        )
        with disk_errors(plan):
            plan.write_bytes(engine.plan)
            cache, layers = _beside(plan)
            if engine.timing_cache is not None:
                cache.write_bytes(engine.timing_cache)
            if engine.layers is not None:
                layers.write_text(engine.layers, "utf-8")
    except EdgeglmError as error:
        send({"error": str(error), "user": isinstance(error, UserError)})
        return 1
    send({"done": {"metadata": engine.metadata, "log": engine.log}})
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), int(sys.argv[2])))
