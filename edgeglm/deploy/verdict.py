"""What the device itself says of a bundle, before it is served: finalize, and mAP@10 on a reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgeglm.core.errors import GateError, UserError
from edgeglm.core.words import printable
from edgeglm.deploy.connection import Device
from edgeglm.deploy.options import DeployOptions
from edgeglm.deploy.parcel import Parcel
from edgeglm.deploy.report import Report

REFERENCE_MODULE = "edgeglm.deploy.reference"
_RECEIPT_PARTS = ("content_digest", "created", "library", "library_version", "chosen", "evidence")


async def finalized(device: Device, slot: str, options: DeployOptions, report: Report) -> dict[str, Any]:
    """Run ``edgeglm finalize`` there, its progress streamed here; return the receipt.

    Raises what finalize raised there, and UserError where it made engines that the server cannot run.
    """
    flags = ["--engine", options.engine, "--rounds", str(options.rounds), *trust_flags(options)]
    if options.any_board:
        flags.append("--any-board")
    command = ["-m", "edgeglm.cli.main", "finalize", "bundle", "--json", *flags]
    answer = await device.ask("run", lambda line: report.note(_progress(line)), slot=slot, arguments=command)
    _raise_as(answer, "finalize")
    receipt = _printed(answer, "finalize", ("library",))
    receipt.pop("receipt", None)
    if receipt.get("library") == "trtexec":
        raise UserError(
            "trtexec built the engines there and the server cannot run them, because its Python sees no "
            "TensorRT; install python3-libnvinfer on the device, or pass --engine onnxruntime"
        )
    receipt = {part: printable(said) if isinstance(said, str) else said for part, said in receipt.items()}
    return _with(receipt, "finalize", _RECEIPT_PARTS)


async def judged(
    device: Device,
    slot: str,
    status: Mapping[str, Any],
    parcel: Parcel,
    options: DeployOptions,
    report: Report,
) -> dict[str, float]:
    """Hold mAP@10 on the reference against the running bundle's, both measured there. Raises GateError."""
    if not parcel.reference:
        return {}
    report.enter("reference")
    values: dict[str, float] = {}
    current = status["current"]
    for name, which in (("new", slot), ("running", current)):
        if which is None:
            continue
        report.note(f"mAP@10 of the {name} bundle")
        command = ["-m", REFERENCE_MODULE, f"../{which}/bundle", f"../{slot}/reference"]
        # What runs was let in when it was finalized: it is the measure, whatever this one was allowed.
        unsigned = which == current or options.allow_unsigned
        arguments = [*command, *(["--allow-unsigned"] if unsigned else [])]
        answer = await device.ask("run", slot=which, arguments=arguments)
        _raise_as(answer, "the reference run")
        values[name] = float(_printed(answer, "the reference run", ("map10",))["map10"])
    if values["new"] < values.get("running", 0.0) - options.tolerance:
        await device.ask(
            "mark", slot=slot, fields={"state": "failed", "reason": "worse than the running one"}
        )
        raise GateError(
            f"mAP@10 on the reference is {values['new']:.4f} and the running bundle's "
            f"{values['running']:.4f}; the running one stays, deploy a better bundle or pass --tolerance"
        )
    return values


def trust_flags(options: DeployOptions) -> list[str]:
    """Return the flags of edgeglm's own commands for what was allowed."""
    flags = ["--allow-unsigned"] if options.allow_unsigned else []
    return [*flags, *(["--allow-downgrade"] if options.allow_downgrade else [])]


def _printed(answer: Mapping[str, Any], what: str, parts: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object that a command printed there. Raises UserError for anything else."""
    text = str(answer["stdout"])
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{what} on the device printed {printable(text.strip())[:80]!r} where its answer was to be; let "
            "nothing print when a Python starts there (sitecustomize, .pth files), or leave --python out"
        ) from error
    return _with(found, what, parts)


def _with(found: Any, what: str, parts: Sequence[str]) -> dict[str, Any]:
    if not isinstance(found, dict) or any(part not in found for part in parts):
        raise UserError(
            f"what {what} on the device printed is not what this edgeglm reads; have the same version on "
            "both sides (leave --python out to bring it along)"
        )
    return found


def _progress(line: str) -> str:
    """Return a line of ``EDGEGLM_PROGRESS=lines`` in words; other lines as they are."""
    try:
        found = json.loads(line)
    except ValueError:
        return line
    if not isinstance(found, dict):
        return line
    parts: Sequence[str] = [str(found.get("task", "")), str(found.get("note", ""))]
    return ": ".join(part for part in parts if part)


def _raise_as(answer: Mapping[str, Any], what: str) -> None:
    code = int(answer["code"])
    if code == 0:
        return
    words = [line.removeprefix("error: ") for line in answer["words"] if line.startswith("error: ")]
    if any("No module named 'edgeglm" in line for line in answer["words"]):
        raise UserError(
            "what --python names on the device has no edgeglm; leave --python out to bring it along"
        )
    text = words[-1] if words else "; ".join(answer["words"][-4:]) or f"status {code}"
    if code < 0:
        text = f"it was killed by signal {-code}; free some memory there and deploy again"
    raise (GateError if code == 3 else UserError)(f"{what} on the device: {printable(text)}")
