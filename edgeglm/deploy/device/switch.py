"""From one slot to the other, and back by itself when the other never gets ready."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from edgeglm.deploy.device.layout import Layout, read_json, write_json
from edgeglm.deploy.device.service import Service, wait_ready
from edgeglm.deploy.device.wire import Refused

_LAST_WORDS = 4
_BACK_SECONDS = 60.0


def activate(layout: Layout, service: Service, slot: str, seconds: float) -> dict[str, Any]:
    """Serve a slot; return from which it came and how long that took, in seconds.

    The link changes first, in one rename; the journal beside it says what was begun, so that whoever comes
    after a power cut can judge it. Raises Refused when the slot did not get ready: the former one then
    serves again.
    """
    started = time.monotonic()
    former = layout.pointed("current")
    write_json(layout.root / "switching.json", {"from": former, "to": slot})
    layout.point("current", slot)
    reason: str | None
    try:
        service.restart()
        reason = wait_ready(service, slot, seconds)
    except Refused as error:
        reason = str(error).partition(";")[0]
    if reason is not None:
        words = "; ".join(_words(service))
        back = _go_back(layout, service, former)
        layout.write_record(slot, state="failed", reason=reason)
        raise Refused(
            f"the new bundle never got ready: {reason}{f' ({words})' if words else ''}; {back}, "
            "see 'edgeglm logs', mend the bundle and deploy again",
            code=3,
        )
    _judged(layout, slot, former)
    return {"from": former, "to": slot, "seconds": round(time.monotonic() - started, 3)}


def recover(layout: Layout, service: Service) -> str | None:
    """End a switch that was cut off: keep the new slot if it is ready, else go back. Say what was done."""
    journal = read_json(layout.root / "switching.json")
    if not journal:
        return None
    former, slot = journal.get("from"), str(journal.get("to"))
    there = layout.pointed("current") == slot and service.state().get("slot") == slot
    if there and wait_ready(service, slot, 1.0) is None:
        _judged(layout, slot, former)
        return f"a switch to slot {slot} had been cut off; it is ready and stays"
    return f"a switch to slot {slot} had been cut off; {_go_back(layout, service, former)}"


def _judged(layout: Layout, slot: str, former: str | None) -> None:
    layout.write_record(slot, state="ready", activated=time.time())
    if former is not None and former != slot:
        layout.point("previous", former)
    (layout.root / "switching.json").unlink(missing_ok=True)


def _go_back(layout: Layout, service: Service, former: str | None) -> str:
    layout.point("current", former)
    if former is None:
        service.stop()
        words = "nothing had been served before and nothing is now"
    else:
        state = service.state()
        if state.get("slot") != former or not state.get("ready"):
            service.restart()
        reason = wait_ready(service, former, _BACK_SECONDS)
        words = "the former one serves again" if reason is None else f"the former one fails too: {reason}"
    (layout.root / "switching.json").unlink(missing_ok=True)
    return words


def _words(service: Service) -> list[str]:
    """Return the last error that the program wrote, or its last lines."""
    lines: list[str] = []
    with suppress(Exception):
        lines = [line.strip() for line in service.log(40) if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return errors[-1:] or lines[-_LAST_WORDS:]
