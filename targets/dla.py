"""Whether a target's deep-learning accelerator can be used at all."""

from __future__ import annotations

from edgeglm.targets.legality import Verdict
from edgeglm.targets.schema import Target, members_of


def check_dla(target: Target) -> Verdict:
    """Say whether every member has a DLA and a TensorRT release with its compiler."""
    verdicts = []
    for member in members_of(target):
        releases = [runtime for runtime in member.runtimes if runtime.dla]
        if member.dla is None:
            reason = f"{member.name} has no DLA; use its GPU"
        elif not releases:
            listed = ", ".join(f"{runtime.library} {runtime.version}" for runtime in member.runtimes)
            reason = f"{member.name} has a DLA, but none of {listed} brings its compiler; use its GPU"
        else:
            runtime = releases[-1]
            jetpack = f" of JetPack {runtime.jetpack}" if runtime.jetpack else ""
            reason = (
                f"{member.name} has {member.dla.cores} DLA cores, with TensorRT {runtime.version}{jetpack}"
            )
            verdicts.append(Verdict(ok=True, target=member.name, reason=reason))
            continue
        verdicts.append(Verdict(ok=False, target=member.name, reason=reason, nearest="gpu"))
    worst = next((verdict for verdict in verdicts if not verdict.ok), verdicts[0])
    if target.kind != "family":
        return worst
    return Verdict(
        ok=worst.ok,
        target=worst.target,
        reason=f"{target.name}: {worst.reason}",
        nearest=worst.nearest,
        members=tuple(verdicts),
    )
