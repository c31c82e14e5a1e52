"""`edgeglm plan`: what a target takes, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeglm.cli.console import App, json_option, trust_options
from edgeglm.cli.plan_tables import (
    print_boards,
    print_details,
    print_dla,
    print_matrix,
    print_nodes,
    print_precisions,
)
from edgeglm.core.errors import UserError

if TYPE_CHECKING:
    from edgeglm.compile.preflight import Subject
    from edgeglm.targets.schema import Lane, ResolvedTarget, Target


_BATCHES = (1, 8, 32)


@click.command(name="plan")
@click.argument("subject", type=click.Path(path_type=Path), required=False)
@click.option("--target", "target_name", help="A target's name or .toml file; without it, all of them.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    default=_BATCHES,
    show_default=True,
    type=click.IntRange(min=1),
    help="Of floors and memory; may be given several times.",
)
@click.option("--nodes", "with_nodes", is_flag=True, help="With --target: the floor of every node.")
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
    batches: tuple[int, ...],
    with_nodes: bool,
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
        if plot is not None or with_nodes:
            raise UserError("there is nothing to draw without SUBJECT; give a bundle or an .onnx file")
        print_precisions(app, targets, print_dla(app, targets) if with_dla else [])
        return
    if with_nodes and target_name is None:
        raise UserError("--nodes is of one target; name it with --target")
    from edgeglm.compile.fit import by_variant, fits_of, require_fit
    from edgeglm.compile.preflight import preflight
    from edgeglm.targets.schema import members_of

    subjects, carried = _subjects(app, subject)
    if carried is not None and target_name in (None, carried.target.name):
        boards = {member.name: member for member in carried.members}  # with what its recipe asks
        targets = [boards.get(target.name, target) for target in targets]
    else:
        boards = {}
    results = [[preflight(one, target, batches=batches) for one in subjects] for target in targets]
    members = [boards.get(m.name, m) for m in members_of(targets[0])] if target_name else []
    fits = fits_of(by_variant(subjects), members, batch=batches[0])
    if target_name is None:
        print_matrix(app, targets, subjects, results)
    elif len(members) > 1:
        print_boards(app, fits, results[0])
    else:
        print_details(app, results[0])
    nodes = _nodes(app, targets[0], subjects, batches[0]) if with_nodes else []
    if plot is not None:
        _plot(plot, targets, subjects)
        app.print(f"rooflines, batch {' and '.join(map(str, _BATCHES))}: {plot}")
    commands = _commands(targets, boards, subjects) if with_commands else []
    for member, line in commands:
        app.print(f"# {member}")
        if not app.json:
            app.console.out.print(line, soft_wrap=True)  # whole, to be copied
    dla = print_dla(app, targets, subjects) if with_dla else []
    app.emit(
        {
            "preflight": [one for row in results for one in row],
            "boards": list(fits),
            "nodes": nodes,
            "trtexec": [{"member": member, "command": line} for member, line in commands],
            "dla": dla,
            "plot": plot,
        }
    )
    require_fit(fits)


def _nodes(app: App, target: Target, subjects: tuple[Subject, ...], batch: int) -> list[dict[str, object]]:
    """Print the floors of the nodes of every graph on every board, and return all of them."""
    from edgeglm.targets.roofline import machine_of, node_floors
    from edgeglm.targets.schema import members_of

    found: list[dict[str, object]] = []
    for member in members_of(target):
        for one in subjects:
            floors = node_floors(one.costs, machine_of(member), batch)
            print_nodes(app, f"{one.name}, batch {batch}, on {member.name}", floors)
            found.append({"graph": one.name, "machine": member.name, "batch": batch, "nodes": list(floors)})
    return found


def _plot(place: Path, targets: list[Target], subjects: tuple[Subject, ...]) -> None:
    from edgeglm.bundle.atomic import disk_errors
    from edgeglm.targets.roofline import floor_of, machine_of
    from edgeglm.targets.roofline_plot import Roof, roofline_svg
    from edgeglm.targets.schema import members_of

    members = {member.name: member for target in targets for member in members_of(target)}
    roofs = []
    for machine in map(machine_of, members.values()):
        floors = [(one.name, floor_of(one.costs, machine, batch)) for one in subjects for batch in _BATCHES]
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
    from edgeglm.compile.contract import target_of

    with open_bundle(path, trust=app.trust()) as bundle:
        carries = "target.toml" in bundle.manifest.files
        return subjects_of(bundle), target_of(bundle) if carries else None


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
