"""Gates: a measured value against a threshold.

A required gate raises (:func:`require_ratio`, :func:`require_at_least`) and stops the build. An
optional one only judges (:class:`Verdict`): the caller leaves the candidate out and the report
says why.
"""

from __future__ import annotations

import math

import msgspec

from edgeglm.core.errors import GateError


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One value that must reach a threshold. NaN never does.

    Attributes:
        name: What is judged, such as ``"int8 / fp32 student, unseen"``.
        value: The measured value.
        threshold: The least value that passes.
    """

    name: str
    value: float
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether the value reaches the threshold."""
        return self.value >= self.threshold

    def sentence(self) -> str:
        """Say the figures, such as ``"unseen: 0.9713 >= 0.96"``."""
        return f"{self.name}: {self.value:.4f} {'>=' if self.passed else '<'} {self.threshold:g}"


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The outcome of an optional candidate: all its gates, and whether it may be kept."""

    candidate: str
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether there are gates and all of them pass."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    @property
    def worst(self) -> Gate:
        """The gate with the least value relative to its threshold; NaN is worse than any."""
        return min(self.gates, key=lambda gate: _margin(gate))

    def sentence(self) -> str:
        """Say in one line what happened and why."""
        if not self.gates:
            return f"{self.candidate} was left out: nothing was measured"
        failed = [gate for gate in self.gates if not gate.passed]
        if not failed:
            return f"{self.candidate} passed: {self.worst.sentence()}"
        return f"{self.candidate} was left out: {'; '.join(gate.sentence() for gate in failed)}"


def ratio(value: float, reference: float) -> float:
    """Return ``value / reference``; NaN, which passes no gate, when the reference is not positive."""
    return value / reference if reference > 0 else math.nan


def require_at_least(name: str, value: float, threshold: float, *, remedy: str) -> Gate:
    """Return the passed gate, or raise GateError with the figures and the remedy."""
    gate = Gate(name=name, value=value, threshold=threshold)
    if not gate.passed:
        raise GateError(f"{name} is {value:.4f}, below the gate of {threshold:g}; {remedy}")
    return gate


def require_ratio(name: str, *, value: float, reference: float, minimum: float, remedy: str) -> Gate:
    """Return the passed gate on ``value / reference``, or raise GateError.

    Args:
        name: What is compared, such as ``"student / teacher mAP@10 on catalogue-transductive"``.
        value: The candidate's figure.
        reference: The figure it is held against.
        minimum: The least ratio that passes, usually from the recipe's ``[gates]``.
        remedy: What the user can do; the last clause of the message.
    """
    gate = Gate(name=name, value=ratio(value, reference), threshold=minimum)
    if not gate.passed:
        share = "cannot be compared" if math.isnan(gate.value) else f"is {gate.value:.4f}"
        raise GateError(
            f"{name} {share} ({value:.4f} against {reference:.4f}), "
            f"and the gate asks for {minimum:g}; {remedy}"
        )
    return gate


def _margin(gate: Gate) -> float:
    return -math.inf if math.isnan(gate.value) else gate.value - gate.threshold
