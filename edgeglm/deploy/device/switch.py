"""From one slot to the other, and back by itself when the other never gets ready.

How a slot is served (which service, which address) belongs to the switch: it is published with the link,
and the journal holds how the former slot was served, so that going back is going back in this, too.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeglm.deploy.device.layout import Layout, read_json, write_json
from edgeglm.deploy.device.service import Service, service_for, wait_ready
from edgeglm.deploy.device.wire import Refused

_LAST_WORDS = 4
_JOURNAL = re.compile(r"\S+ \S+ (?P<name>[^\s\[]+)\[(?P<process>\d+)\]: ")
"""What journalctl sets before a line: when, where and who."""
_BACK_SECONDS = 60.0
_WHAT_SERVES = ("manifest_sha256", "environment", "serve_flags")
_REMEDIES = {
    False: "mend the bundle and deploy again",
    True: "then go back with more --ready-seconds, or deploy",
}
_FAULTS = (Refused, OSError, subprocess.SubprocessError)

Settings = dict[str, Any]


def settings_in_force(layout: Layout) -> Settings:
    """Return how the current slot is served: service, host, port, gpu. Nothing before the first deploy."""
    found = read_json(layout.root / "device.json")
    leaving = found.pop("leaving", None)  # so it once was: the new way stood there before it was in use
    return {**found, "service": leaving} if leaving else found


def check_settings(layout: Layout, settings: Settings) -> None:
    """Raise Refused where this device cannot be served in that way; nothing is changed."""
    token = settings.get("token_file")
    if token and not (Path(token).is_absolute() and os.access(token, os.R_OK)):
        raise Refused(
            f"there is no token file {token} on the device that this user can read; write the token there, "
            "and name the file by its whole path"
        )
    service_for(layout, settings).check()
    host, port = str(settings["host"]), int(settings["port"])
    own = service_for(layout, settings_in_force(layout)).state().get("port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, 0 if port == own else port))
    except (OSError, OverflowError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise Refused(
            f"the device cannot listen on {host}:{port}: {words}; "
            "end what uses it there, or pass another --port or --host"
        ) from error


def activate(
    layout: Layout, slot: str, seconds: float | None, settings: Settings | None = None
) -> dict[str, Any]:
    """Serve a slot, by default as it was served before; return from which it came and the seconds that took.

    It is waited for ``seconds``; for None as long as its own deploy waited, and a minute at least.

    The journal comes first and says what was begun, so that whoever comes after a power cut can judge it; the
    link changes in one rename. Raises Refused when the slot did not get ready: the former one then serves
    again, as it was served.
    """
    started = time.monotonic()
    former, before = layout.pointed("current"), settings_in_force(layout)
    after = settings or layout.record(slot).get("settings") or before
    journal = {"from": former, "to": slot, "before": before, "after": after}
    others = service_for(layout, before).state() if before else {}
    write_json(layout.root / "switching.json", journal)
    service = service_for(layout, after)
    reason: str | None
    try:
        service.prepare()
        layout.point("current", slot)
        write_json(layout.root / "device.json", after)
        if before and before.get("service") != after.get("service"):  # or two of them would want one port
            _quietly(service_for(layout, before).remove)
        service.restart()
        reason = wait_ready(service, slot, seconds or _start_seconds(layout, slot))
    except _FAULTS as error:
        reason = _in_words(error)
    if reason is not None:
        words = "; ".join(_words(service, [others.get("pid"), others.get("child")]))
        back = _go_back(layout, journal)
        again = slot == layout.pointed("previous")  # it did serve, and may be tried again with more patience
        with suppress(OSError):
            layout.write_record(slot, **({} if again else {"state": "failed"}), reason=reason)
        raise Refused(
            f"the {'former' if again else 'new'} bundle never got ready: "
            f"{reason}{f' ({words})' if words else ''}; {back}, "
            f"see 'edgeglm logs', {_REMEDIES[again]}",
            code=3,
        )
    _judged(layout, journal)
    return {"from": former, "to": slot, "seconds": round(time.monotonic() - started, 3)}


def recover(layout: Layout) -> str | None:
    """End a switch that was cut off: keep the new slot if it is ready, else go back. Say what was done."""
    found = read_json(layout.root / "switching.json")
    if not found:
        return None
    now = settings_in_force(layout)
    journal = {"before": now, "after": now, **found, "to": str(found.get("to"))}
    slot = journal["to"]
    service = service_for(layout, journal["after"])
    there = layout.pointed("current") == slot and service.state().get("slot") == slot
    if there and wait_ready(service, slot, 1.0) is None:
        write_json(layout.root / "device.json", journal["after"])
        _judged(layout, journal)
        return f"a switch to slot {slot} had been cut off; it is ready and stays"
    return f"a switch to slot {slot} had been cut off; {_go_back(layout, journal)}"


def _judged(layout: Layout, journal: dict[str, Any]) -> None:
    former, slot, after = journal.get("from"), journal["to"], journal["after"]
    stands_by = bool(service_for(layout, after).state().get("stands_by"))
    layout.write_record(slot, state="ready", activated=time.time(), settings=after, stands_by=stands_by)
    if former is not None and former != slot and not _is_repeated(layout, journal):
        layout.point("previous", former)
    (layout.root / "switching.json").unlink(missing_ok=True)


def _is_repeated(layout: Layout, journal: dict[str, Any]) -> bool:
    """Say whether the former slot served the very same: then the one before it stays what is gone back to.

    So it is where a switch was done and its answer was lost, and the same command came again.
    """
    former, slot = journal["from"], journal["to"]
    if layout.pointed("previous") == slot or journal["before"] != journal["after"]:
        return False
    one, other = layout.record(former), layout.record(slot)
    return all(one.get(part) == other.get(part) for part in _WHAT_SERVES)


def _go_back(layout: Layout, journal: dict[str, Any]) -> str:
    """Serve the former slot as it was served; say what came of it. Nothing is raised.

    What could not be brought to its end stays in the journal, and the next command tries again.
    """
    former, before, after = journal.get("from"), journal["before"], journal["after"]
    try:
        layout.point("current", former)
        new = service_for(layout, after)
        if former is None:
            _quietly(new.remove)
            (layout.root / "device.json").unlink(missing_ok=True)
            words = "nothing had been served before and nothing is now"
        else:
            write_json(layout.root / "device.json", before)
            if before.get("service") != after.get("service"):
                _quietly(new.remove)
            old = service_for(layout, before)
            _quietly(old.prepare)
            state = old.state()
            if state.get("slot") != former or not state.get("ready"):
                old.restart()
            reason = wait_ready(old, former, _start_seconds(layout, former))
            words = "the former one serves again" if reason is None else f"the former one fails too: {reason}"
        (layout.root / "switching.json").unlink(missing_ok=True)
    except _FAULTS as error:
        return f"going back failed: {_in_words(error)}"
    return words


def _start_seconds(layout: Layout, slot: str) -> float:
    """Return how long a slot that served before may take until it answers."""
    waited = layout.record(slot).get("ready_seconds")
    return max(_BACK_SECONDS, waited) if isinstance(waited, (int, float)) else _BACK_SECONDS


def _quietly(step: Any) -> None:
    with suppress(*_FAULTS):
        step()


def _in_words(error: BaseException) -> str:
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    return str(error).partition(";")[0]


def _words(service: Service, others: Sequence[object] = ()) -> list[str]:
    """Return the last error that the program wrote, or its last lines.

    Where a journal says who wrote a line, those of systemd are left out, and all up to the last one of
    ``others``, the processes that served before.
    """
    lines: list[str] = []
    with suppress(Exception):
        for line in service.log(40):
            found = _JOURNAL.match(line)
            text = line[found.end() :] if found else line
            if found and int(found["process"]) in others:
                lines.clear()
            elif text.strip() and not line.startswith("-- ") and not (found and found["name"] == "systemd"):
                lines.append(text.strip())
    errors = [line for line in lines if line.startswith("error:")]
    return errors[-1:] or lines[-_LAST_WORDS:]
