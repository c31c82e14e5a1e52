"""`edgeglm build`: the whole way, from a recipe to a bundle for a target."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeglm.build.shipped import known_recipes
from edgeglm.cli.console import App, json_option, trust_options
from edgeglm.core.words import human_bytes

if TYPE_CHECKING:
    from edgeglm.build.pipeline import Plan
    from edgeglm.build.run import Built
    from edgeglm.build.student_choice import Choice
    from edgeglm.build.table import Row
    from edgeglm.core.recipe import Recipe
    from edgeglm.core.stage import StageResult
    from edgeglm.deploy.hosts import HostName
    from edgeglm.deploy.summary import Summary
    from edgeglm.targets.schema import Target

RECIPE_HELP = f"A shipped recipe ({', '.join(known_recipes())}) or the path of your own .toml file."
SET_HELP = "Override one value of the recipe, such as student.size=edge-xs; may be given again."
_COLUMNS = (("step", -18), ("time", 7), ("names", 5), ("unseen", 6), ("keyw.", 5), ("R@1", 5), ("R@10", 5),
            ("i>t@1", 5), ("i>t@10", 6), ("ms b1", 5), ("ms b8", 5), ("size", 8))  # fmt: skip


@click.command(name="build")
@click.option("--target", required=True, help="A known target (see edgeglm targets) or a .toml file.")
@click.option("--recipe", default="default", show_default=True, help=RECIPE_HELP)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=SET_HELP)
@click.option("--data", type=click.Path(path_type=Path), help="Your own pairs: a folder or a Parquet file.")
@click.option("--output", type=click.Path(path_type=Path), help="The bundle folder. Default: bundles/TARGET.")
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="CPU threads.")
@click.option("--skip-bad", is_flag=True, help="Leave out pairs whose image or caption is unusable.")
@click.option("--on", "devices", multiple=True, metavar="USER@HOST", help="Build its engines there too.")
@click.option("--on-python", help="An interpreter on those devices that has edgeglm already.")
@click.option("--on-root", help="Where edgeglm lies on them, as edgeglm deploy --root.")
@click.option("--on-engine", type=click.Choice(["auto", "native", "onnxruntime"]), default="auto")
@click.option("--on-any-board", is_flag=True, help="Go on although they are outside the target.")
@click.option(
    "--latency-budget",
    metavar="TIME",
    help="Search for the best student whose image and text take no longer, such as 10ms: by the target's "
    "floor where its peaks are known, else as measured here.",
)
@click.option(
    "--memory-budget", metavar="SIZE", help="The same for the size of its FP32 files, such as 20MB."
)
@click.option("--trials", type=int, help="Students that a search within a budget proposes. Default: 12.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and the stages, and stop.")
@trust_options
@json_option
@click.pass_obj
def command(
    app: App,
    target: str,
    recipe: str,
    overrides: tuple[str, ...],
    data: Path | None,
    output: Path | None,
    threads: int,
    skip_bad: bool,
    dry_run: bool,
    devices: tuple[str, ...],
    on_python: str | None,
    on_root: str | None,
    on_engine: str,
    on_any_board: bool,
    latency_budget: str | None,
    memory_budget: str | None,
    trials: int | None,
) -> int | None:
    """Build a bundle for TARGET. Finished stages are kept: the same command goes on where it stopped."""
    from edgeglm.bundle.pack import require_free
    from edgeglm.cli.build_search import search_of, searched, undecided_recipe
    from edgeglm.targets.schema import load_target

    wanted = load_target(target)
    resolved = resolved_recipe(recipe, overrides, data, skip_bad)
    destination = output or Path("bundles") / wanted.name
    search = search_of(latency_budget, memory_budget, trials, overrides)
    hosts = _hosts(devices)
    _note_unread(app, resolved)
    if dry_run:
        if resolved.data.source != "icons" and resolved.data.path is not None:
            from edgeglm.data.records import source_file

            source_file(Path(resolved.data.path), resolved.data.source)  # refused now, not an hour later
        _print_plan(app, undecided_recipe(resolved, search), wanted, destination)
        if search:
            app.print(f"student: the best of {search.trials} within {search.budget}, not the recipe's size")
        return None
    require_free(destination, resolved.pack.archive)
    sized = searched(app, resolved, wanted, search, threads) if search else None
    resolved = sized.recipe if sized else resolved
    started = time.perf_counter()
    built, reused = _built(app, resolved, wanted, destination, threads, sized)
    chosen = {"python": on_python, "root": on_root, "engine": on_engine, "any_board": on_any_board}
    staged = _staged_on(app, built.bundle, hosts, **chosen) if hosts else None
    _print_end(app, built, reused, time.perf_counter() - started, staged)
    return staged.exit_code if staged else None


def _note_unread(app: App, recipe: Recipe) -> None:
    from edgeglm.build.unheard import unread_passes

    note_unread_data(app, recipe)
    if unread := unread_passes(recipe.student):
        app.note(
            f"{', '.join(unread)}: not read, as student.losses trains both towers together for "
            f"student.losses.steps = {recipe.student.losses.steps} steps"
        )


def note_unread_data(app: App, recipe: Recipe) -> None:
    """Name what a recipe says of the icons where the pairs are one's own."""
    from edgeglm.build.unheard import unread_data

    if unread := unread_data(recipe.data):
        app.note(f"{', '.join(unread)}: not read, as the pairs are your own and no icons")


def note_measured(app: App, result: StageResult) -> None:
    """Say what of the pairs was left out, and how many captions a teacher does not read, or in part."""
    measured = result.artifact.provenance["measured"]
    if result.stage == "pairs" and (skipped := measured.get("skipped")):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        app.note(f"{sum(skipped.values())} pairs left out: {reasons}")
    if result.stage == "teacher" and (said := measured.get("captions")):
        if said["cut"]:
            app.note(
                f"{said['cut']:,} of {said['texts']:,} captions are longer than {said['tokens']} tokens, "
                "and what follows is not read; set student.max_length higher"
            )
        if said["unknown"]:
            app.note(
                f"{said['unknown']:,} of {said['texts']:,} captions hold nothing that the text tower knows, "
                "and are alike to it; choose another teacher.text"
            )


def resolved_recipe(
    name: str, overrides: tuple[str, ...], data: Path | None = None, skip_bad: bool = False
) -> Recipe:
    """Return the recipe that a command line asks for. Raises UserError."""
    import msgspec

    from edgeglm.build.command_line import own_name
    from edgeglm.build.shipped import load_recipe, own_gates

    recipe = load_recipe(name, overrides)
    if data is None and not skip_bad:
        return recipe
    changed = msgspec.structs.replace(recipe.data, skip_bad=skip_bad or recipe.data.skip_bad)
    if data is not None:
        source = "parquet" if data.suffix == ".parquet" else "folder"
        changed = msgspec.structs.replace(changed, source=source, path=str(data.resolve()))
        recipe = msgspec.structs.replace(recipe, name=own_name(data.resolve()))
        if not name.endswith(".toml"):
            kept = {
                override.partition("=")[0].strip().removeprefix("gates.")
                for override in overrides
                if override.strip().startswith("gates.")
            }
            recipe = msgspec.structs.replace(recipe, gates=own_gates(recipe.gates, kept))
    return msgspec.structs.replace(recipe, data=changed)


def _built(
    app: App, recipe: Recipe, target: Target, destination: Path, threads: int, sized: Choice | None
) -> tuple[Built, list[str]]:
    from edgeglm.build.pipeline import plan_build
    from edgeglm.build.run import run_build
    from edgeglm.core.stage import Context
    from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE

    store = app.store()
    reused: list[str] = []

    def on_stage(result: StageResult) -> None:
        if result.reused:
            reused.append(result.stage)
        note_measured(app, result)

    with app.progress.task(f"Building for {target.name}"):
        plan: Plan = plan_build(
            recipe,
            target,
            store,
            app.progress,
            search=sized.artifact if sized else None,
            asked=sized.asked if sized else None,
        )
        app.print(f"recipe {recipe.name}, target {target.name}, {len(plan.nodes)} stages; mAP@10 on names, "
                  "unseen names and keywords, recall on names")  # fmt: skip
        app.print("both ways, milliseconds of an image and a text together (1 thread, batch 1 and 8), size")
        app.print(ONE_RELEVANT_NOTE)
        app.print("  ".join(f"{name:{_align(width)}}" for name, width in _COLUMNS))
        context = Context(store=store, progress=app.progress, threads=threads)
        built = run_build(
            plan, destination, context, on_stage=on_stage, on_row=lambda row: app.print(row_line(row))
        )
    store.collect()
    return built, reused


def row_line(row: Row) -> str:
    """Format one row of the growing table."""
    from edgeglm.build.table import summary_of
    from edgeglm.build.timed_towers import BATCHES, both_towers

    cells: list[str] = [row.title, "reused" if row.reused else f"{row.seconds:.1f} s"]
    summary = summary_of(row.metrics)
    cells += [f"{value:.3f}" if value is not None else "-" for value in summary]
    cells += [f"{both_towers(row.latency, batch):.1f}" if row.latency else "-" for batch in BATCHES]
    cells.append(human_bytes(row.size_bytes) if row.size_bytes else "-")
    line = "  ".join(f"{cell:{_align(width)}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    if not row.kept:
        return f"{line}  left out: {row.note}"
    return f"{line}  {row.note}" if row.note else line


def _align(width: int) -> str:
    return f"<{-width}" if width < 0 else f">{width}"


def _hosts(devices: tuple[str, ...]) -> tuple[HostName, ...]:
    """Return the devices of ``--on``. What is wrong with them is told now, not after the build."""
    if not devices:
        return ()
    from edgeglm.deploy.hosts import hosts_from_texts
    from edgeglm.deploy.ssh import asyncssh_module

    asyncssh_module()
    return hosts_from_texts(devices)


def _staged_on(app: App, bundle: Path, hosts: tuple[HostName, ...], **chosen: Any) -> Summary:
    """Build the engines on devices: the bundle stays staged there, what the builder says comes home.

    ``chosen`` are fields of DeployOptions.
    """
    from edgeglm.cli.deploy import live_table, print_rows
    from edgeglm.deploy.options import DeployOptions
    from edgeglm.deploy.session import deployed
    from edgeglm.deploy.summary import FleetPlan

    chosen = {**chosen, "allow_unsigned": app.allow_unsigned, "allow_downgrade": app.allow_downgrade}
    options = DeployOptions(activate=False, **chosen)
    with live_table(app) as on_change:
        summary = deployed(bundle, hosts, options, FleetPlan(canary=0), app.store(), on_change)
    print_rows(app, summary)
    if left := [one.device for one in summary.devices if one.outcome != "done"]:
        command = f"edgeglm deploy {bundle} {' '.join(left)} --stage"
        app.note(f"the bundle is built; for what is left, with the options that are named: {command}")
    return summary


def _print_end(
    app: App, built: Built, reused: list[str], seconds: float, staged: Summary | None = None
) -> None:
    import msgspec

    from edgeglm.build.pools import gate_pools
    from edgeglm.build.table import language_rows, latency_rows
    from edgeglm.data.pairs import PairSet

    app.print("")
    pairs = next(result.artifact for result in built.results if result.stage == "pairs")
    tracks = PairSet.open(pairs).tracks
    if by_language := language_rows(built.rows, tracks):
        pools = tuple(f">{pool}" for pool in gate_pools(tracks))
        app.table(("step", *pools), by_language, title="mAP@10 by language")
    app.table(
        ("model", ">image b1", ">image b8", ">text b1", ">text b8", ">parameters"),
        latency_rows({result.stage: result for result in built.results}, built.manifest),
        title="milliseconds a call, ONNX Runtime, 1 thread, interleaved",
    )
    manifest = built.manifest
    stages = len(built.results)
    app.print(f"{stages - len(reused)} of {stages} stages ran, {len(reused)} reused, {seconds:.1f} s")
    app.print(f"bundle   {built.bundle} ({human_bytes(manifest.size)}, default variant "
              f"{manifest.default_variant})")  # fmt: skip
    for left in manifest.left_out:
        app.print(f"left out {left.name}: {left.reason}")
    if built.archive is not None:
        app.print(f"archive  {built.archive}")
    app.print(f"digest   {manifest.content_digest}")
    app.print(f"report   {built.bundle / 'report.html'}")
    app.print(f'try      edgeglm run {built.bundle} --query "a red apple"')
    devices = [] if staged is None else msgspec.to_builtins(staged.devices)
    app.emit({**_as_json(built, seconds), "devices": devices})


def _as_json(built: Built, seconds: float) -> dict[str, Any]:
    return {
        "bundle": str(built.bundle),
        "archive": None if built.archive is None else str(built.archive),
        "content_digest": built.manifest.content_digest,
        "default_variant": built.manifest.default_variant,
        "left_out": {left.name: left.reason for left in built.manifest.left_out},
        "seconds": round(seconds, 3),
        "skipped_pairs": next(
            result.artifact.provenance["measured"].get("skipped", {})
            for result in built.results
            if result.stage == "pairs"
        ),
        "stages": [
            {"stage": result.stage, "reused": result.reused, "seconds": round(result.seconds, 3)}
            for result in built.results
        ],
        "rows": [
            {
                "title": row.title,
                "kept": row.kept,
                "note": row.note,
                "seconds": round(row.seconds, 3),
                "metrics": row.metrics,
                "latency_ms": row.latency,
                "size_bytes": row.size_bytes,
            }
            for row in built.rows
        ],
    }


def _print_plan(app: App, recipe: Recipe, target: Target, destination: Path) -> None:
    import msgspec
    import tomli_w

    from edgeglm.build.pipeline import stage_names
    from edgeglm.core.recipe import toml_tree

    names = stage_names(recipe, target)
    app.print(tomli_w.dumps(toml_tree(recipe)).rstrip())
    app.print(f"\nstages: {', '.join(names)}")
    app.print(f"bundle: {destination}")
    app.emit({"recipe": msgspec.to_builtins(recipe), "stages": names, "bundle": str(destination)})
