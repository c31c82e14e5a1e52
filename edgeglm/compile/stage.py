"""The compile stage: every engine that can be built here, and the reason for every one that cannot.

Input ``quantize`` holds ``models/<variant>/image.onnx`` and ``models/<variant>/text.onnx``. The
artifact holds ``engines/<variant>-<tower>-sm<SM>.plan`` with its record and the builder's log beside it,
and ``compile.json``, which accounts for every member of the target. What native TensorRT timed is kept in
the store, outside of all keys: it makes the next build of the same graph quicker and no other.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

from edgeglm.bundle.atomic import disk_errors
from edgeglm.compile.contract import TOWERS, Tower, precision_of, tower_profiles, variants_of
from edgeglm.compile.decision import MemberPlan, plan_compile
from edgeglm.compile.worker import BuildRequest, engine_built_apart
from edgeglm.core.artifact import Artifact
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import EdgeglmError, UserError
from edgeglm.core.recipe import EngineConfig
from edgeglm.core.stage import Context, Inputs, Stage
from edgeglm.engines.libraries import Library
from edgeglm.engines.nvml import driver_version
from edgeglm.engines.plan import plan_metadata_from_file
from edgeglm.targets.build_options import BuildOptions, Range
from edgeglm.targets.description import dotted_sm
from edgeglm.targets.legality import check_precision
from edgeglm.targets.schema import ResolvedTarget, Target, resolve_target


class CompileConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to build.

    Attributes:
        target: The target with its members' profiles inside.
        precisions: Variants of these precisions get engines; the others stay ONNX.
        tolerated: A failure to build these is recorded; any other stops the build.
        length: The least, the usual and the largest number of tokens of a text. The batches are
            those of each member's options.
    """

    target: ResolvedTarget
    precisions: tuple[str, ...] = ("fp16", "int8")
    tolerated: tuple[str, ...] = ("int8",)
    length: Range = (1, 16, 32)


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine of one member: where it lies, or why there is none."""

    variant: str
    tower: Tower
    file: str | None = None
    failure: str | None = None


class MemberRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one member of the target."""

    name: str
    status: Literal["built", "deferred", "onnxruntime"]
    reason: str
    library: str | None = None
    library_version: str | None = None
    engines: tuple[EngineRecord, ...] = ()


class CompileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``compile.json``."""

    schema: Literal[1] = 1
    target: str
    members: tuple[MemberRecord, ...]


def compile_config(
    target: Target, *, max_length: int = 32, engine: EngineConfig | None = None
) -> CompileConfig:
    """Return the configuration for a target.

    Args:
        target: Which.
        max_length: The longest text in tokens.
        engine: What the recipe asks of the builder.
    """
    usual = max(1, max_length // 2)
    return CompileConfig(target=resolve_target(target, engine), length=(1, usual, max_length))


def compile_record_from_file(path: Path) -> CompileRecord:
    """Read a ``compile.json``. Raises UserError when it is absent or broken."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=CompileRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; build the bundle again") from error


class CompileStage(Stage[CompileConfig]):
    """Builds what can be built here and says why the rest cannot."""

    name = "compile"
    code: ClassVar[tuple[str, ...]] = (
        "edgeglm.compile",
        "edgeglm.engines.plan",
        "edgeglm.engines.profiles",
        "edgeglm.targets.legality",
    )

    def key_parts(self, inputs: Inputs) -> dict[str, Any]:
        """Add what this machine can build with, as far as it matters for this target."""
        plans = plan_compile(self.config.target)
        decisions = {plan.member.name: [plan.status, plan.library, plan.version] for plan in plans}
        used = {plan.library: plan.version for plan in plans if plan.status == "build"}
        return {**super().key_parts(inputs), "builders": decisions, "libraries": used}

    def requires(self, inputs: Inputs) -> None:
        """Both towers of every variant must be there."""
        variants = variants_of(inputs["quantize"].files)
        if not variants:
            raise UserError("the quantize stage left no models/<variant>/<tower>.onnx; run it again")
        for variant, towers in variants.items():
            if missing := set(TOWERS) - set(towers):
                absent = ", ".join(f"{tower}.onnx" for tower in sorted(missing))
                raise UserError(f"variant {variant!r} lacks {absent}; run the quantize stage again")

    def run(self, inputs: Inputs, out: Path, context: Context) -> Mapping[str, Any]:
        """Build every engine of every member and write ``compile.json``."""
        quantized = inputs["quantize"]
        variants = [
            variant
            for variant in variants_of(quantized.files)
            if precision_of(variant) in self.config.precisions
        ]
        built: dict[tuple[Library, int, BuildOptions | None], tuple[EngineRecord, ...]] = {}
        members = []
        for plan in plan_compile(self.config.target):
            engines: tuple[EngineRecord, ...] = ()
            if plan.status == "build" and plan.library is not None and plan.member.sm is not None:
                # Members of one SM share their engines, unless they ask for other ones.
                where = (plan.library, plan.member.sm, plan.member.engine)
                if where not in built:
                    built[where] = self._engines(plan, variants, quantized, out, context)
                engines = built[where]
            members.append(_member_record(plan, engines))
        record = CompileRecord(target=self.config.target.target.name, members=tuple(members))
        (out / "compile.json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        files = {engine.file for member in members for engine in member.engines if engine.file}
        statuses = {member.name: member.status for member in members}
        return {"engines": len(files), "members": statuses, **_made_for(built)}

    def ensures(self, inputs: Inputs, out: Path, measured: Mapping[str, Any]) -> None:
        """Every engine that ``compile.json`` names is the one its record describes."""
        for member in compile_record_from_file(out / "compile.json").members:
            for engine in member.engines:
                if engine.file is not None:
                    plan = out / engine.file
                    metadata = plan_metadata_from_file(plan.with_suffix(".json"))
                    assert sha256_file(plan) == metadata.plan_sha256
                    onnx = inputs["quantize"].files[f"models/{engine.variant}/{engine.tower}.onnx"]
                    assert metadata.onnx_sha256 == onnx

    def _engines(
        self, plan: MemberPlan, variants: list[str], quantized: Artifact, out: Path, context: Context
    ) -> tuple[EngineRecord, ...]:
        """Build each distinct file once: a tower whose INT8 did not pay is the same file in two variants."""
        records: list[EngineRecord] = []
        made: dict[str, EngineRecord] = {}
        with context.progress.task(f"engines for {plan.member.name}", len(variants) * len(TOWERS)) as task:
            for variant in variants:
                for tower in TOWERS:
                    name = f"models/{variant}/{tower}.onnx"
                    digest = quantized.files[name]
                    if digest not in made or made[digest].file is None:
                        made[digest] = self._engine(plan, variant, tower, quantized.path / name, out, context)
                    shared = made[digest]
                    records.append(msgspec.structs.replace(shared, variant=variant, tower=tower))
                    task.advance()
        return tuple(records)

    def _engine(
        self,
        plan: MemberPlan,
        variant: str,
        tower: Tower,
        model: Path,
        out: Path,
        context: Context,
    ) -> EngineRecord:
        assert plan.library is not None
        precision = precision_of(variant)
        verdict = check_precision(plan.member, precision, library=plan.library)
        if not verdict.ok:
            return EngineRecord(variant=variant, tower=tower, failure=verdict.reason)
        options = plan.member.engine or BuildOptions()
        cache = _timing_cache(context.store.root, plan, sha256_file(model))
        try:
            request = BuildRequest(
                onnx_path=str(model),
                targets=(plan.member,),
                library=plan.library,
                precision=precision,
                profiles=tower_profiles(tower, options.batch, self.config.length, options.buckets),
                options=options,
                variant=variant,
                tower=tower,
                timing_cache=str(cache) if cache.is_file() else None,
            )
            engine = engine_built_apart(request, context.progress)
        except UserError:
            raise
        except EdgeglmError as error:
            if precision not in self.config.tolerated:
                raise
            return EngineRecord(variant=variant, tower=tower, failure=str(error))
        if engine.timing_cache is not None:
            _keep(cache, engine.timing_cache)
        own = f"-{plan.member.name}" if plan.member.engine else ""
        path, _ = engine.write(out / "engines", f"{variant}-{tower}-sm{plan.member.sm}{own}")
        return EngineRecord(variant=variant, tower=tower, file=path.relative_to(out).as_posix())


def _timing_cache(store: Path, plan: MemberPlan, onnx: str) -> Path:
    """Return where the times of one graph's tactics are kept, for one version on one kind of GPU."""
    return store / "timing" / f"{plan.library}-{plan.version}-sm{plan.member.sm}-{onnx[:16]}.cache"


def _keep(place: Path, cache: bytes) -> None:
    with disk_errors(place):
        place.parent.mkdir(exist_ok=True)
        new = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        try:
            new.write_bytes(cache)
            new.replace(place)
        finally:
            new.unlink(missing_ok=True)


def _made_for(
    built: Mapping[tuple[Library, int, BuildOptions | None], tuple[EngineRecord, ...]],
) -> dict[str, Any]:
    """Return the compute capabilities that engines were built for, and the driver of a GPU that is here."""
    sms = sorted({sm for (_, sm, _), engines in built.items() if any(engine.file for engine in engines)})
    if not sms:
        return {}
    driver = driver_version()
    return {
        "compute_capabilities": [dotted_sm(sm) for sm in sms],
        **({"driver": driver} if driver is not None else {}),
    }


def _member_record(plan: MemberPlan, engines: tuple[EngineRecord, ...]) -> MemberRecord:
    if plan.status != "build":
        return MemberRecord(
            name=plan.member.name, status=plan.status, reason=plan.reason, library=plan.library
        )
    if not any(engine.file for engine in engines):
        reasons = "; ".join(dict.fromkeys(engine.failure for engine in engines if engine.failure))
        reason = f"no engine could be built here: {reasons or 'no variant of a wanted precision'}"
        return MemberRecord(
            name=plan.member.name, status="deferred", reason=reason, library=plan.library, engines=engines
        )
    return MemberRecord(
        name=plan.member.name,
        status="built",
        reason=plan.reason,
        library=plan.library,
        library_version=plan.version,
        engines=engines,
    )
