"""What may be asked of devices besides a deploy: to go back, to show, to tell, to forget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeglm.core.errors import EdgeglmError, fault_words
from edgeglm.core.words import printable
from edgeglm.deploy.connection import Device, connected
from edgeglm.deploy.hosts import HostName, bounded, owner_here

if TYPE_CHECKING:
    from edgeglm.deploy.inventory import DeviceRecord, Inventory

_AT_ONCE = 20


@dataclass(frozen=True, kw_only=True)
class RemoteAnswer:
    """What one device answered, or why it did not."""

    device: str
    error: str = ""
    exit_code: int = 0
    answer: dict[str, Any] = field(default_factory=dict)


async def rolled_back(
    host: HostName,
    inventory: Inventory,
    *,
    root: str | None,
    ready_seconds: float | None,
    lock_seconds: float,
) -> dict[str, Any]:
    """Serve what was served before, and return ``from``, ``to`` and the seconds that took there.

    Raises UserError where there is nothing to go back to, GateError when that does not get ready either.
    """
    async with connected(host, root=root or inventory.root_of(str(host))) as device:
        await device.ask("lock", owner=owner_here(), seconds=lock_seconds)
        await device.begin("rollback", seconds=ready_seconds)
        import edgeglm.deploy.preflight  # noqa: F401 - while the device works and nothing else is to do

        answer = await device.answered()
        facts, status = answer.pop("facts"), answer.pop("status")
        if facts:
            _remembered(host, device, inventory, facts, status)
        else:
            await _seen(host, device, inventory)
        return answer


async def refreshed(host: HostName, inventory: Inventory, *, root: str | None) -> DeviceRecord:
    """Ask a device how it is and remember it."""
    async with connected(host, root=root or inventory.root_of(str(host))) as device:
        return await _seen(host, device, inventory)


async def log_lines(host: HostName, inventory: Inventory, *, root: str | None, lines: int) -> list[str]:
    """Return the last lines that the runner of a device wrote."""
    async with connected(host, root=root or inventory.root_of(str(host))) as device:
        answer = await device.ask("logs", lines=lines)
        return [printable(str(line)) for line in answer["lines"]]


async def removed(
    host: HostName, inventory: Inventory, *, root: str | None, old: bool, lock_seconds: float
) -> dict[str, Any]:
    """Remove edgeglm from a device, or with ``old`` what does not serve; return files and bytes freed."""
    async with connected(host, root=root or inventory.root_of(str(host))) as device:
        await device.ask("lock", owner=owner_here(), seconds=lock_seconds)
        answer = await device.ask("remove", old=old)
        if old:
            await _seen(host, device, inventory)
    if not old and inventory.root_of(str(host)) == device.root:
        inventory.forget(str(host))
    return answer


async def each(hosts: Sequence[HostName], work: Callable[[HostName], Any]) -> list[RemoteAnswer]:
    """Do the same on all of them; an error of one is its row and stops no other."""
    found: dict[str, RemoteAnswer] = {}

    async def one(host: HostName) -> None:
        try:
            answer = await work(host)
            plain = answer if isinstance(answer, (dict, list)) else _builtins(answer)
            found[str(host)] = RemoteAnswer(
                device=str(host), answer=plain if isinstance(plain, dict) else {"lines": plain}
            )
        except EdgeglmError as error:
            found[str(host)] = RemoteAnswer(device=str(host), error=str(error), exit_code=error.exit_code)
        except Exception as error:
            code = EdgeglmError.exit_code
            found[str(host)] = RemoteAnswer(device=str(host), error=fault_words(error), exit_code=code)

    await bounded(hosts, one, _AT_ONCE)
    return [found[str(host)] for host in hosts]


async def _seen(host: HostName, device: Device, inventory: Inventory) -> DeviceRecord:
    facts = await device.ask("facts")
    status = await device.ask("status")
    return _remembered(host, device, inventory, facts, status)


def _remembered(
    host: HostName,
    device: Device,
    inventory: Inventory,
    facts: Mapping[str, Any],
    status: Mapping[str, Any],
) -> DeviceRecord:
    from edgeglm.deploy.preflight import board_from_facts

    return inventory.seen(str(host), status, facts, board_from_facts(facts), None, root=device.root)


def _builtins(answer: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(answer)
