"""What `edgeglm plan` prints: judgements, floors and memory as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeglm.cli.console import App

if TYPE_CHECKING:
    from edgeglm.compile.fit import VariantFit
    from edgeglm.compile.preflight import Preflight, Subject
    from edgeglm.targets.roofline import NodeFloor
    from edgeglm.targets.schema import Target

_NO_PROMISE = "no promise, real engines take longer"
_NODES = 20


def print_details(app: App, results: Sequence[Preflight]) -> None:
    """Print every question and its answer for one device, then the floors and the memory of each batch."""
    app.table(
        ["graph", "what", "answer", "because"],
        [
            (one.subject, check.what, "ok" if check.ok else "refused", check.reason)
            for one in results
            for check in one.checks
        ],
    )
    app.table(
        [
            "graph", ">batch", ">floor ms", "bound by", ">compute ms", ">memory ms", ">unfused ms", ">MFLOP",
            ">MB moved", ">MB to run", ">MB to build",
        ],
        [
            (
                one.subject,
                str(floor.batch),
                f"{floor.floor_ms:.4f}" if floor.binding != "unknown" else "-",
                floor.binding,
                f"{floor.compute_ms:.4f}",
                f"{floor.memory_ms:.4f}",
                f"{floor.unfused_ms:.4f}",
                f"{floor.flops / 1e6:,.0f}",
                f"{floor.bytes / 1e6:,.1f}",
                _megabytes(memory.run),
                _megabytes(memory.build),
            )
            for one in results
            for floor, memory in zip(one.floors, one.memory, strict=True)
        ],
        title=f"floor of one call on {results[0].target}: {_NO_PROMISE}; unfused is the sum of the nodes",
    )  # fmt: skip


def print_boards(app: App, fits: Sequence[VariantFit], results: Sequence[Preflight]) -> None:
    """Print what each board of a family takes, why it refuses the rest, and the memory of each batch."""

    def cell(fit: VariantFit) -> str:
        if not fit.fits:
            return "no"
        return "ok" if fit.floor_ms is None else f"{fit.floor_ms:.4f}"

    variants = list(dict.fromkeys(fit.variant for fit in fits))
    rows = {fit.member: [cell(f) for f in fits if f.member == fit.member] for fit in fits}
    app.table(
        ["board", *(f">{name}" for name in variants)],
        [(member, *cells) for member, cells in rows.items()],
        title=f"floor in ms of one call of every graph, batch {results[0].floors[0].batch}, where it fits: "
        f"{_NO_PROMISE}",
    )
    for refusal in dict.fromkeys(refusal for fit in fits for refusal in fit.refusals):
        app.print(refusal)
    print_memory(app, results)


def print_matrix(
    app: App, targets: Sequence[Target], subjects: Sequence[Subject], results: Sequence[Sequence[Preflight]]
) -> None:
    """Print one row a target and one column a graph: floors of each batch, or what is refused."""

    def cell(one: Preflight) -> str:
        if not one.ok:
            return f"no {next(check.what for check in one.checks if not check.ok)}"
        worst: dict[int, float] = {}
        for floor in one.floors:
            if floor.binding != "unknown":
                worst[floor.batch] = max(worst.get(floor.batch, 0.0), floor.floor_ms)
        return " ".join(f"{value:.3f}" for value in worst.values()) or "ok"

    judged = {target.name: row for target, row in zip(targets, results, strict=True)}

    def cells(target: Target) -> list[str]:
        rows = [judged[name] for name in target.members if name in judged]
        if not rows:
            return [cell(one) for one in judged[target.name]]
        fitting = [sum(one.ok for one in column) for column in zip(*rows, strict=True)]
        return [f"{count} of {len(rows)}" for count in fitting]  # a bundle may hold one graph for each lane

    batches = " ".join(str(batch) for batch in dict.fromkeys(f.batch for f in results[0][0].floors))
    app.table(
        ["target", *(f">{one.name}" for one in subjects)],
        [(target.name, *cells(target)) for target in targets],
        title=f"floor in ms of batch {batches} where it fits ({_NO_PROMISE}), else what is refused, for a "
        "family how many boards take it (edgeglm plan --target NAME says why)",
    )
    print_memory(app, results[0])


def print_memory(app: App, results: Sequence[Preflight]) -> None:
    """Print what each graph needs, which is the same wherever it is built and run."""
    batches = list(dict.fromkeys(memory.batch for memory in results[0].memory))
    rows = []
    for one in results:
        run = {memory.batch: memory.run for memory in one.memory}
        rows.append(
            (one.subject, _megabytes(one.memory[0].build), *(_megabytes(run[batch]) for batch in batches))
        )
    app.table(
        ["graph", ">to build", *(f">to run, batch {batch}" for batch in batches)],
        rows,
        title="memory in MB, on every target alike; a target that has less says 'no memory'",
    )


def print_nodes(app: App, graph: str, nodes: Sequence[NodeFloor]) -> None:
    """Print the nodes that take longest; ``--json`` has all of them."""
    whole = sum(node.floor_ms for node in nodes) or 1.0
    heaviest = sorted(nodes, key=lambda node: -node.floor_ms)[:_NODES]
    app.table(
        ["node", "op", "precision", ">MFLOP", ">MB", ">compute ms", ">memory ms", "bound by", ">share"],
        [
            (
                node.name,
                node.op,
                node.precision,
                f"{node.flops / 1e6:,.2f}",
                f"{node.bytes / 1e6:,.3f}",
                f"{node.compute_ms:.5f}",
                f"{node.memory_ms:.5f}",
                node.binding,
                f"{node.floor_ms / whole:.1%}",
            )
            for node in heaviest
        ],
        title=f"{graph}: {len(heaviest)} of {len(nodes)} nodes, each by itself, nothing fused",
    )


def print_precisions(app: App, targets: Sequence[Target], dla: list[object]) -> None:
    """Print which precisions each target takes, and of a single one why it refuses the others."""
    from edgeglm.targets.legality import PRECISIONS, check_precision

    verdicts = {
        target.name: {name: check_precision(target, name) for name in PRECISIONS} for target in targets
    }
    app.table(
        ["target", *PRECISIONS],
        [(name, *("yes" if v.ok else "no" for v in row.values())) for name, row in verdicts.items()],
    )
    if len(targets) == 1:
        for verdict in verdicts[targets[0].name].values():
            if not verdict.ok:
                app.print(verdict.reason)
    app.emit({"precisions": verdicts, "dla": dla})


def print_dla(app: App, targets: Sequence[Target], subjects: Sequence[Subject] = ()) -> list[object]:
    """Print whether each board's DLA takes each graph, or without graphs whether it is there at all."""
    from edgeglm.targets.dla import check_dla

    devices = [target for target in targets if target.kind != "cpu"]
    verdicts = {("", target.name): check_dla(target) for target in devices}
    for one in subjects:
        for target in devices:
            if any(board.ok for board in verdicts["", target.name].members or [verdicts["", target.name]]):
                verdicts[f" {one.name}", target.name] = check_dla(
                    target, precision=one.precision, costs=one.costs, lane=one.lane
                )
    for (name, _), verdict in verdicts.items():
        for board in verdict.members or (verdict,):
            app.print(f"DLA{name}: {board.reason}")
    return list(verdicts.values())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size else "-"
