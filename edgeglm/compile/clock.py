"""How many times faster than FP16 a file is on the GPU of this machine, where that is what it is for.

Engines are built as ``finalize`` builds them, for the very shapes that are timed, and called in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from edgeglm.bundle.atomic import scratch_folder
from edgeglm.compile.builder import EnginePlan
from edgeglm.compile.decision import Host, plan_compile, this_host
from edgeglm.compile.worker import BuildRequest, engine_built_apart
from edgeglm.core.digest import sha256_file
from edgeglm.core.progress import Progress, QuietProgress
from edgeglm.engines.cuda_devices import cuda_devices
from edgeglm.engines.libraries import Library
from edgeglm.engines.plan import PlanMetadata, ShapeRange
from edgeglm.engines.protocol import Engine, Feeds
from edgeglm.engines.tensorrt_engine import TensorRtEngine
from edgeglm.engines.timing import compare_latency
from edgeglm.targets.build_options import BuildOptions
from edgeglm.targets.schema import ResolvedTarget, Target

_ROUNDS = 15


@dataclass(frozen=True, kw_only=True)
class GpuClock:
    """Times files beside another on GPU 0: ``clock(fp16, feeds)(file)`` is how many times faster it is.

    Attributes:
        member: The device that GPU 0 is.
        library: Who builds and runs.
        version: Its version.
        progress: Where builds are shown.
        build: Builds one engine, in a process of its own by default.
        native: Makes the engine of (plan, its record).
    """

    member: Target
    library: Library
    version: str
    progress: Progress
    build: Callable[[BuildRequest, Progress], EnginePlan] = engine_built_apart
    native: Callable[[Path, PlanMetadata], Engine] = TensorRtEngine

    @property
    def words(self) -> str:
        """Who times, for reports."""
        return f"{self.library} {self.version} on {self.member.name}"

    def __call__(self, fp16: Path, feeds: Sequence[Feeds]) -> Callable[[Path], float]:
        """Return what times a file beside ``fp16``: the least gain over ``feeds``.

        FP16's engine is built at the first call, and a file whose bytes were timed is not built again.
        What is returned raises EdgeglmError where the builder refuses a file.
        """
        reference: list[EnginePlan] = []
        known: dict[str, float] = {}

        def measured(path: Path) -> float:
            digest = sha256_file(path)
            if digest not in known:
                if not reference:
                    reference.append(self._built(fp16, feeds))
                known[digest] = self._timed(reference[0], self._built(path, feeds), feeds)
            return known[digest]

        return measured

    def _built(self, path: Path, feeds: Sequence[Feeds]) -> EnginePlan:
        request = BuildRequest(
            onnx_path=str(path),
            targets=(self.member,),
            library=self.library,
            precision="fp16",  # a label: the graph says what is computed, and was held to the target before
            profiles=tuple(_profile(feed) for feed in feeds),
            options=self.member.engine or BuildOptions(),
            variant=path.stem,
        )
        return self.build(request, self.progress)

    def _timed(self, fp16: EnginePlan, other: EnginePlan, feeds: Sequence[Feeds]) -> float:
        with scratch_folder("edgeglm-clock-") as folder, ExitStack() as opened:
            engines = {}
            for name, built in (("fp16", fp16), ("other", other)):
                plan, _ = built.write(Path(folder), name)
                engines[name] = opened.enter_context(self.native(plan, built.metadata))
            gains = []
            for feed in feeds:
                calls = {name: (engine, feed) for name, engine in engines.items()}
                found = compare_latency(calls, rounds=_ROUNDS)
                gains.append(found["fp16"].median_ms / found["other"].median_ms)
            return min(gains)


def gpu_clock(
    target: Target | ResolvedTarget, *, progress: Progress | None = None, host: Host | None = None
) -> GpuClock | None:
    """Return what times files for a target here; None where GPU 0 is none of its devices, or nobody builds.

    Args:
        target: A device or a family.
        progress: Where builds are shown.
        host: What can build here; this machine if None.
    """
    first = [device.sm for device in cuda_devices()[:1]]
    for plan in plan_compile(target, host=host or this_host()) if first else ():
        if plan.status == "build" and plan.member.sm in first:
            assert plan.library is not None
            assert plan.version is not None
            return GpuClock(
                member=plan.member,
                library=plan.library,
                version=plan.version,
                progress=progress or QuietProgress(),
            )
    return None


def _profile(feed: Feeds) -> dict[str, ShapeRange]:
    return {name: ShapeRange(min=a.shape, opt=a.shape, max=a.shape) for name, a in feed.items()}
