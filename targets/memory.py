"""How much memory a model needs to be built and to be run, before either is tried.

Building holds the graph, the builder's copy, the timed tactics and the plan at once: three to four
times the weights were seen (NVIDIA/TensorRT-Edge-LLM#30). Running holds the weights and activations;
ONNX Runtime keeps a second, packed copy of the weights. These are limits to refuse by, no promise.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeglm.targets.legality import Verdict
from edgeglm.targets.schema import Target, members_of

BUILD_FACTOR = 4
RUN_FACTOR = 2
LIBRARY_BYTES = 300 << 20
"""What the process and its inference library take before any model is loaded."""


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that one model needs. ``weights`` is the size of its file."""

    weights: int

    @property
    def build(self) -> int:
        """Bytes to build its engine."""
        return BUILD_FACTOR * self.weights + LIBRARY_BYTES

    @property
    def run(self) -> int:
        """Bytes to run it, activations apart."""
        return RUN_FACTOR * self.weights + LIBRARY_BYTES


@dataclass(frozen=True, kw_only=True)
class MemoryAt:
    """Bytes that a graph needs for one batch; ``build`` is 0 where nothing is built."""

    batch: int
    build: int
    run: int


def check_memory(target: Target, weights: int, *, activations: int = 0) -> Verdict:
    """Say whether every member of a target has room to build and to run.

    Args:
        target: A device, a family, or the CPU (whose memory no profile knows).
        weights: Bytes of the largest model's file.
        activations: Bytes of the activations that live at once, at the largest batch.
    """
    need = MemoryNeed(weights=weights)
    verdicts = []
    for member in members_of(target):
        builds = member.builder not in (None, "onnxruntime")
        wanted = max(need.run + activations, need.build if builds else 0)
        if member.memory_gb is None:
            reason = f"{member.name} has the memory of its machine; {wanted / 1e9:.2f} GB are needed"
            verdicts.append(Verdict(ok=True, target=member.name, reason=reason))
            continue
        room = int(member.memory_gb.value * 1e9)
        text = f"{member.name} has {member.memory_gb.value:g} GB, building needs {need.build / 1e9:.2f} GB"
        text += f" and running {(need.run + activations) / 1e9:.2f} GB"
        if wanted <= room:
            verdicts.append(Verdict(ok=True, target=member.name, reason=text))
        else:
            reason = f"{text}; take a smaller student or a board with more memory"
            verdicts.append(Verdict(ok=False, target=member.name, reason=reason))
    refused = [verdict for verdict in verdicts if not verdict.ok]
    worst = refused[0] if refused else verdicts[0]
    members = tuple(verdicts) if target.kind == "family" else ()
    return Verdict(ok=worst.ok, target=worst.target, reason=worst.reason, members=members)
