"""`edgeglm plan`: what a target takes, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, json_option, trust_options
from edgeglm.core.errors import UserError

if TYPE_CHECKING:
    from edgeglm.compile.fit import VariantFit
    from edgeglm.compile.preflight import Preflight, Subject
    from edgeglm.targets.schema import Lane, ResolvedTarget, Target


_PLOTTED = (1, 8, 32)


@click.command(name="plan")
@click.argument("subject", type=click.Path(path_type=Path), required=False)
@click.option("--target", "target_name", help="A target's name or .toml file; without it, all of them.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Of the floor.")
@click.option("--trtexec", "with_commands", is_flag=True, help="Print the commands that build by hand.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the rooflines into this SVG.")
@click.option("--dla", "with_dla", is_flag=True, help="Ask for the deep-learning accelerator too.")
@trust_options
@json_option
@click.pass_obj
def command(
    app: App,
    subject: Path | None,
    target_name: str | None,
    batch: int,
    with_commands: bool,
    plot: Path | None,
    with_dla: bool,
) -> None:
    """Say whether SUBJECT, a bundle or an .onnx file, fits a target, and how fast it can possibly be.

    Without SUBJECT: which precisions each target takes. Without --target: all targets at once. Times
    are floors from peak figures, never promises. Exits with 2 when --target takes no variant of it.
    """
    from edgeglm.targets.schema import known_targets, load_target

    targets = [load_target(name) for name in ([target_name] if target_name else known_targets())]
    if subject is None:
        if plot is not None:
            raise UserError("there is nothing to draw without SUBJECT; give a bundle or an .onnx file")
        _precisions(app, targets, with_dla=with_dla)
        return
    from edgeglm.compile.fit import by_variant, fits_of, require_fit
    from edgeglm.compile.preflight import preflight
    from edgeglm.targets.schema import members_of

    subjects, carried = _subjects(app, subject)
    if carried is not None and target_name in (None, carried.target.name):
        boards = {member.name: member for member in carried.members}  # with what its recipe asks
        targets = [boards.get(target.name, target) for target in targets]
    else:
        boards = {}
    results = [[preflight(one, target, batch=batch) for one in subjects] for target in targets]
    members = [boards.get(m.name, m) for m in members_of(targets[0])] if target_name else []
    fits = fits_of(by_variant(subjects), members, batch=batch)
    if target_name is None:
        _matrix(app, targets, subjects, results)
    elif len(members) > 1:
        _boards(app, fits)
    else:
        _details(app, results[0])
    if plot is not None:
        _plot(plot, targets, subjects)
        app.print(f"rooflines, batch {' and '.join(map(str, _PLOTTED))}: {plot}")
    commands = _commands(targets, boards, subjects) if with_commands else []
    for member, line in commands:
        app.print(f"# {member}")
        if not app.json:
            app.console.out.print(line, soft_wrap=True)  # whole, to be copied
    dla = _dla(app, targets, subjects) if with_dla else []
    app.emit(
        {
            "preflight": [one for row in results for one in row],
            "boards": list(fits),
            "trtexec": [{"member": member, "command": line} for member, line in commands],
            "dla": dla,
            "plot": plot,
        }
    )
    require_fit(fits)


def _plot(place: Path, targets: list[Target], subjects: tuple[Subject, ...]) -> None:
    from edgeglm.bundle.atomic import disk_errors
    from edgeglm.targets.roofline import floor_of, machine_of
    from edgeglm.targets.roofline_plot import Roof, roofline_svg
    from edgeglm.targets.schema import members_of

    members = {member.name: member for target in targets for member in members_of(target)}
    roofs = []
    for machine in map(machine_of, members.values()):
        floors = [(one.name, floor_of(one.costs, machine, batch)) for one in subjects for batch in _PLOTTED]
        roofs.append(Roof(machine=machine, floors=tuple(floors)))
    with disk_errors(place):
        place.write_text(roofline_svg(roofs), "utf-8")


def _subjects(app: App, path: Path) -> tuple[tuple[Subject, ...], ResolvedTarget | None]:
    """Return the graphs to judge, and the target that a bundle carries."""
    from edgeglm.compile.preflight import Subject, precision_of_graph, subjects_of

    if path.suffix == ".onnx":
        from edgeglm.export.costs import costs_from_onnx

        costs = costs_from_onnx(path)
        lane: Lane = "A" if costs.opset <= 16 else "B"
        name, precision = path.name, precision_of_graph(costs)
        return (Subject(name=name, precision=precision, lane=lane, costs=costs, file=str(path)),), None
    from edgeglm.bundle.verify import open_bundle
    from edgeglm.compile.route import target_of

    with open_bundle(path, trust=app.trust()) as bundle:
        carries = "target.toml" in bundle.manifest.files
        return subjects_of(bundle), target_of(bundle) if carries else None


def _details(app: App, results: list[Preflight]) -> None:
    app.table(
        ["graph", "what", "", "because"],
        [
            (one.subject, check.what, "ok" if check.ok else "refused", check.reason)
            for one in results
            for check in one.checks
        ],
    )
    app.table(
        ["graph", "on", ">floor ms", "bound by", ">compute ms", ">memory ms", ">MFLOP", ">MB"],
        [
            (
                one.subject,
                floor.machine,
                f"{floor.floor_ms:.4f}" if floor.binding != "unknown" else "-",
                floor.binding,
                f"{floor.compute_ms:.4f}",
                f"{floor.memory_ms:.4f}",
                f"{floor.flops / 1e6:,.0f}",
                f"{floor.bytes / 1e6:,.1f}",
            )
            for one in results
            for floor in one.floors
        ],
        title=f"floor of one call, batch {results[0].floors[0].batch}: no promise, real engines take longer",
    )


def _boards(app: App, fits: Sequence[VariantFit]) -> None:
    """Print what each board of a family takes, and why it refuses the rest."""

    def cell(fit: VariantFit) -> str:
        if not fit.fits:
            return "no"
        return "ok" if fit.floor_ms is None else f"{fit.floor_ms:.4f}"

    variants = list(dict.fromkeys(fit.variant for fit in fits))
    rows = {fit.member: [cell(f) for f in fits if f.member == fit.member] for fit in fits}
    app.table(
        ["board", *(f">{name}" for name in variants)],
        [(member, *cells) for member, cells in rows.items()],
        title="floor in ms of one call of every graph, where it fits: no promise, real engines take longer",
    )
    for refusal in dict.fromkeys(refusal for fit in fits for refusal in fit.refusals):
        app.print(refusal)


def _matrix(
    app: App, targets: list[Target], subjects: tuple[Subject, ...], results: list[list[Preflight]]
) -> None:
    def cell(one: Preflight) -> str:
        if not one.ok:
            return f"no {next(check.what for check in one.checks if not check.ok)}"
        floors = [floor.floor_ms for floor in one.floors if floor.binding != "unknown"]
        return f"{max(floors):.4f}" if floors else "ok"

    judged = {target.name: row for target, row in zip(targets, results, strict=True)}

    def cells(target: Target) -> list[str]:
        rows = [judged[name] for name in target.members if name in judged]
        if not rows:
            return [cell(one) for one in judged[target.name]]
        fitting = [sum(one.ok for one in column) for column in zip(*rows, strict=True)]
        return [f"{count} of {len(rows)}" for count in fitting]  # a bundle may hold one graph for each lane

    app.table(
        ["target", *(f">{one.name}" for one in subjects)],
        [(target.name, *cells(target)) for target in targets],
        title="floor in ms where it fits, else what is refused, for a family how many boards take it "
        "(edgeglm plan --target NAME says why)",
    )


def _precisions(app: App, targets: list[Target], *, with_dla: bool) -> None:
    from edgeglm.targets.legality import PRECISIONS, check_precision

    verdicts = {
        target.name: {name: check_precision(target, name) for name in PRECISIONS} for target in targets
    }
    app.table(
        ["target", *PRECISIONS],
        [(name, *("yes" if v.ok else "no" for v in row.values())) for name, row in verdicts.items()],
    )
    if len(targets) == 1:
        refused = [v.reason for v in verdicts[targets[0].name].values() if not v.ok]
        for reason in refused:
            app.print(reason)
    dla = _dla(app, targets) if with_dla else []
    app.emit({"precisions": verdicts, "dla": dla})


def _dla(app: App, targets: list[Target], subjects: Sequence[Subject] = ()) -> list[object]:
    """Print whether each target's DLA takes each graph, or without graphs whether it is there at all."""
    from edgeglm.targets.dla import check_dla

    devices = [target for target in targets if target.kind != "cpu"]
    verdicts = {("", target.name): check_dla(target) for target in devices}
    for one in subjects:
        for target in devices:
            if verdicts["", target.name].ok:
                verdicts[f" {one.name}", target.name] = check_dla(
                    target, precision=one.precision, costs=one.costs, lane=one.lane
                )
    for (name, _), verdict in verdicts.items():
        app.print(f"DLA{name}: {verdict.reason}")
    return list(verdicts.values())


def _commands(
    targets: list[Target], boards: Mapping[str, Target], subjects: tuple[Subject, ...]
) -> list[tuple[str, str]]:
    from edgeglm.compile.preflight import preflight, shapes_of
    from edgeglm.compile.trtexec import command_line, trtexec_arguments
    from edgeglm.targets.build_options import BuildOptions
    from edgeglm.targets.legality import refused_by
    from edgeglm.targets.schema import members_of

    lines: dict[tuple[str, str], None] = {}
    for target in targets:
        for member in (boards.get(found.name, found) for found in members_of(target)):
            runtimes = [runtime for runtime in member.runtimes if runtime.library == "tensorrt"]
            for one in subjects:
                if not preflight(one, member, library="tensorrt").ok:
                    continue
                for runtime in (found for found in runtimes if found.lane == one.lane):
                    if next(refused_by(member, runtime), None):
                        continue
                    name = f"{one.name.replace(' ', '-').removesuffix('.onnx')}-{member.name}"
                    arguments = trtexec_arguments(
                        one.file,
                        f"{name}.plan",
                        profile=shapes_of(one.costs, (member.engine or BuildOptions()).batch),
                        precision=one.precision,
                        runtime=runtime,
                        fp32_nodes=one.fp32_nodes,
                        options=member.engine,
                        timing_cache=f"{name}-{runtime.version}.timing",
                    )
                    heading = f"{member.name}, TensorRT {runtime.version}"
                    lines[heading, command_line(arguments)] = None
    return list(lines)
