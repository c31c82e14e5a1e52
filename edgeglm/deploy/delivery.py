"""One bundle onto one device, step by step. Until the switch, whatever happens, the former one serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from edgeglm.bundle.trust import moment_of
from edgeglm.core.digest import sha256_file
from edgeglm.core.errors import UserError
from edgeglm.core.words import printable
from edgeglm.deploy.connection import Device, connected
from edgeglm.deploy.evidence import Evidence, evidence_from
from edgeglm.deploy.hosts import HostName, owner_here
from edgeglm.deploy.inventory import Inventory, url_of
from edgeglm.deploy.options import DeployOptions, token_file_of
from edgeglm.deploy.parcel import Parcel
from edgeglm.deploy.preflight import board_from_facts, check_board, check_clock, check_space
from edgeglm.deploy.report import Report
from edgeglm.deploy.upload import send_files, send_text
from edgeglm.deploy.verdict import finalized, judged
from edgeglm.deploy.wheels import Wheels
from edgeglm.engines.board import Board

LEAST_READY_SECONDS = 1.0
_OWN_FLAGS = ("--allow-downgrade", "--no-grpc")  # words for ``edgeglm serve`` that a deploy adds
clock = time.time


class Delivered(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one device. ``sent_bytes`` is all that went there, the talk included.

    ``dropped`` are the options that the former bundle was served with and this one is not.
    """

    device: str
    board: str
    slot: str
    content_digest: str
    files_sent: int
    sent_bytes: int
    seconds: dict[str, float]
    chosen: str
    evidence: str
    map10: dict[str, float] = {}
    url: str | None = None
    dropped: tuple[str, ...] = ()
    receipt: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What a delivery uses on this side.

    Attributes:
        inventory: What is remembered of devices, and the manifests that they have.
        wheels: Returns what an interpreter (version, machine, glibc) needs; asked in threads.
        keep: Takes the evidence that a device sent home.
        caches: Returns the timing caches that other boards of a kind sent home, by name below engines/.
    """

    inventory: Inventory
    wheels: Callable[[tuple[int, int], str, str], Wheels]
    keep: Callable[[Evidence], None]
    caches: Callable[[Board], Mapping[str, Path]]


async def deliver(
    host: HostName, parcel: Parcel, options: DeployOptions, tools: Tools, report: Report
) -> Delivered:
    """Bring a bundle onto a device, finalize it there, judge it, and serve it.

    Raises:
        UserError: host key, user, Python, space, board, clock, signature, lock; nothing was changed.
        GateError: the bundle is worse than the running one, or never got ready; the former one serves.
        ConnectionLostError: what came through counts the next time.
    """
    report.enter("connect")
    root = options.root or tools.inventory.root_of(str(host))
    async with connected(host, root=root) as device:
        facts = await device.ask("facts")
        board = board_from_facts(facts)
        if not options.any_clock:
            check_clock(facts, now=clock())
        check_board(board, parcel, any_board=options.any_board)
        report.enter("lock")
        settings = {
            "service": facts["best_service"] if options.service == "auto" else options.service,
            "host": options.host,
            "port": options.port,
            "gpu": board.sm is not None,
            **({"python": options.python} if options.python else {}),
            **({"token_file": token} if (token := token_file_of(options.serve_flags)) else {}),
        }
        status = await device.ask(
            "lock",
            owner=owner_here(),
            seconds=options.lock_seconds,
            create=True,
            settings=settings if options.activate else None,
        )
        if status["recovered"]:
            report.note(status["recovered"])
        _check_downgrade(status, parcel, options)
        dropped = _dropped(status, settings, options) if options.activate else ()
        # Minutes, the first time: the connection is kept alive meanwhile.
        wheels = None if options.python else await asyncio.to_thread(_wheels, tools, facts)
        report.enter("upload")
        # A device's own timing caches are nearer; where it has none, those of another board of its kind help.
        caches = {} if status["timing_caches"] or options.engine == "onnxruntime" else tools.caches(board)
        engines = {name: (sha256_file(path), path) for name, path in caches.items()}
        count = await _upload(device, facts, status, parcel, wheels, engines, tools, report)
        slot = await _assembled(device, parcel, options, wheels, engines, report)
        report.enter("finalize")
        receipt = await finalized(device, slot, options, report)
        map10 = await judged(device, slot, status, parcel, options, report)
        # Writing waits for this machine's disk, and the other devices need not wait for that.
        await asyncio.to_thread(tools.keep, await evidence_from(device, slot, str(host), board, receipt))
        url = None
        # With the slot: after a rollback, or where another is staged, the last receipt is not of what serves.
        await device.ask("mark", slot=slot, fields={"chosen": receipt["chosen"]})
        if options.activate:
            report.enter("switch", "waiting until it answers")
            seconds = max(options.ready_seconds, LEAST_READY_SECONDS)
            await device.ask("activate", slot=slot, seconds=seconds, settings=settings)
            url = url_of((await device.ask("status"))["service"]["state"])
        else:
            await device.ask("mark", slot=slot, fields={"state": "staged"})
        await device.ask("collect")
        report.enter("done", url or f"staged in slot {slot}")
        status = await device.ask("status")
        await asyncio.to_thread(tools.inventory.remember_manifest, parcel.manifest_bytes)
        seen = partial(tools.inventory.seen, root=device.root)
        await asyncio.to_thread(seen, str(host), status, facts, board, receipt)
        return Delivered(
            device=str(host),
            board=board.words,
            slot=slot,
            content_digest=parcel.manifest.content_digest,
            files_sent=count,
            sent_bytes=device.sent_bytes,
            seconds=report.seconds,
            chosen=receipt["chosen"],
            evidence=receipt["evidence"],
            map10=map10,
            url=url,
            dropped=dropped,
            receipt=receipt,
        )


async def _upload(
    device: Device,
    facts: Mapping[str, Any],
    status: Mapping[str, Any],
    parcel: Parcel,
    wheels: Wheels | None,
    engines: Mapping[str, tuple[str, Path]],
    tools: Tools,
    report: Report,
) -> int:
    """Send the manifest, hear what is missing, and send that."""
    known = status["manifests"]
    if parcel.manifest_sha256 not in known:
        bases = filter(None, map(tools.inventory.manifest, known))
        await send_text(device, parcel.manifest_bytes, base=next(bases, None))
    listed = {record.sha256 for record in parcel.manifest.files.values()}
    beside = [(sha, path.stat().st_size) for sha, path in parcel.objects.items() if sha not in listed]
    beside += [(sha, path.stat().st_size) for sha, path in engines.values()]
    question: dict[str, Any] = {"manifest": parcel.manifest_sha256, "objects": beside}
    objects = {**parcel.objects, **dict(engines.values())}
    if wheels is not None:
        question["environment"] = wheels.name
        question["wheels"] = [(sha, path.stat().st_size) for sha, path in wheels.files.values()]
        objects.update(wheels.files.values())
    answer = await device.ask("missing", **question)
    total = int(answer["needed_bytes"])
    installs = wheels is not None and not answer["environment_complete"]
    check_space(total, int(facts["free_bytes"]), printable(device.root), installs=installs)
    gone = 0

    def moved(count: int) -> None:
        nonlocal gone
        gone += count
        report.note(f"{gone / 1e6:.1f} of {total / 1e6:.1f} MB")

    return await send_files(device, answer["missing"], objects, moved)


async def _assembled(
    device: Device,
    parcel: Parcel,
    options: DeployOptions,
    wheels: Wheels | None,
    engines: Mapping[str, tuple[str, Path]],
    report: Report,
) -> str:
    """Make the environment and lay the bundle into the spare slot; return that slot."""
    if wheels is not None:
        report.enter("install")
        names = {file: sha for file, (sha, _) in wheels.files.items()}
        await device.ask("environment", say=report.note, name=wheels.name, wheels=names)
    report.enter("assemble")
    # What serves was let in by finalize. Its age is not asked again at each start: a device that has had a
    # newer one would else not go back, nor start what it serves.
    unsigned = ["--allow-unsigned"] if options.allow_unsigned else []
    downgrade, without_grpc = _OWN_FLAGS
    flags = [*options.serve_flags, *unsigned, downgrade]
    if not any(flag.partition("=")[0] in ("--grpc-port", without_grpc) for flag in flags):
        flags.append(without_grpc)
    answer = await device.ask(
        "assemble",
        manifest=parcel.manifest_sha256,
        beside=parcel.beside,
        reference=parcel.reference,
        engines={name: sha for name, (sha, _) in engines.items()},
        environment=wheels.name if wheels is not None else None,
        borrow=options.python,
        record={
            "bundle": parcel.manifest.name,
            "content_digest": parcel.manifest.content_digest,
            "created": parcel.manifest.created,
            "target": parcel.manifest.target.name,
            "serve_flags": flags,
            "ready_seconds": options.ready_seconds,
        },
    )
    return str(answer["slot"])


def _dropped(
    status: Mapping[str, Any], settings: Mapping[str, Any], options: DeployOptions
) -> tuple[str, ...]:
    """Return the words of this command that would have it served as it was; none for a first bundle."""
    running, before = status["slots"].get(status["current"] or ""), status["service"]
    if running is None:
        return ()
    names = ("service", "host", "port")
    words = [
        f"--{name}={before[name]}" for name in names if before.get(name, settings[name]) != settings[name]
    ]
    flags = [flag for flag in running.get("serve_flags", ()) if flag not in (*_OWN_FLAGS, "--allow-unsigned")]
    if any(flag not in options.serve_flags for flag in flags):
        words += [f"--serve-flag={flag}" for flag in flags]
    return tuple(words)


def _check_downgrade(status: Mapping[str, Any], parcel: Parcel, options: DeployOptions) -> None:
    running = status["slots"].get(status["current"] or "", {})
    same = running.get("bundle") == parcel.manifest.name
    if same and not options.allow_downgrade and _is_older(parcel, str(running.get("created", ""))):
        raise UserError(
            f"the running {running['bundle']} was made on {running['created']}, this one on "
            f"{parcel.manifest.created}: it is older; pass --allow-downgrade if you mean it, "
            "or use edgeglm rollback"
        )


def _is_older(parcel: Parcel, running: str) -> bool:
    try:
        return moment_of(parcel.manifest.created) < moment_of(running)
    except ValueError:  # what runs there says no date
        return False


def _wheels(tools: Tools, facts: Mapping[str, Any]) -> Wheels:
    major, minor, _ = facts["python"]
    return tools.wheels((major, minor), str(facts["machine"]), str(facts["glibc"]))
