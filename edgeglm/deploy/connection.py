"""One SSH connection to a device, and the device's side of the talk, started through it.

asyncssh reads the user's ``~/.ssh/config``, keys and agent. A host key that is not in ``known_hosts`` is
refused, always.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from edgeglm.core.errors import EdgeglmError, GateError, UserError
from edgeglm.core.words import printable
from edgeglm.deploy.agent_source import agent_command, agent_source
from edgeglm.deploy.hosts import HostName
from edgeglm.deploy.ssh import asyncssh_module
from edgeglm.deploy.ssh_options import ALIVE_COUNT, ALIVE_SECONDS, host_key_error, ssh_options

if TYPE_CHECKING:
    import asyncssh

OLDEST_PYTHON = (3, 10)
_CONNECT_SECONDS = 20
_LONGEST_ANSWER = 512 << 20
"""Bytes: far above the evidence of any bundle, so that a device cannot fill this machine's memory."""

_PART_BYTES = 1 << 16
"""So much is inflated at a time, to a thousand times of it at most."""

Say = Callable[[str], None]


class ConnectionLostError(EdgeglmError):
    """The connection ended in the middle. What came through is kept; the same command goes on."""


class Device:
    """The sender's end of the talk with one device."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes], host: HostName) -> None:
        self._process = process
        self._host = host
        self.sent_bytes = 0
        self.root = ""
        self._early: asyncio.Future[dict[str, Any]] | None = None
        self._inflating = zlib.decompressobj()
        self._inflated = bytearray()

    async def ask(self, question: str, say: Say | None = None, **parts: Any) -> dict[str, Any]:
        """Ask one question and return the answer; lines that come before it go to ``say``.

        Raises UserError or GateError as the device refuses, ConnectionLostError.
        """
        await self.begin(question, **parts)
        return await self.answered(say)

    async def begin(self, question: str, **parts: Any) -> None:
        """Ask one question, whose answer is taken later."""
        await self.write(json.dumps({"ask": question, **parts}).encode() + b"\n")

    async def answered(self, say: Say | None = None) -> dict[str, Any]:
        """Return the next answer."""
        while True:
            message = await self._line()
            if "answer" in message:
                answer = message["answer"]
                assert isinstance(answer, dict)
                return answer
            if "line" in message:
                if say is not None:
                    say(printable(message["line"]))
            elif "refused" in message:
                raise (GateError if message["code"] == 3 else UserError)(printable(message["refused"]))
            else:
                raise EdgeglmError(
                    f"the device's side failed ({message.get('broken', message)}); "
                    "this is a fault of edgeglm, report it with these words"
                )

    async def ask_for_files(self) -> None:
        """Begin to send files: headers and their bytes follow."""
        await self.write(b'{"ask": "receive"}\n')
        self._early = asyncio.ensure_future(self.answered())  # a full disk is told before all was sent

    async def files_sent(self) -> int:
        """End it, and return how many the device has kept."""
        await self.write(b'{"end": true}\n')
        assert self._early is not None
        early, self._early = self._early, None
        return int((await early)["received"])

    async def write(self, data: bytes) -> None:
        """Send bytes. Raises ConnectionLostError, or what the device refuses meanwhile."""
        if self._early is not None and self._early.done():
            self._early.result()
        try:
            self._process.stdin.write(data)
            self.sent_bytes += len(data)
            await self._process.stdin.drain()
            await asyncio.sleep(0)  # drain() alone never lets others run, nor a lost connection be noticed
        except (OSError, asyncssh_module().Error) as error:
            raise self._lost(error) from error

    async def open(self, root: str | None) -> None:
        """Send the device's side where it is not kept, and hear where its root is.

        Raises UserError where there is no Python, or no such root.
        """
        too_old: list[str] = []
        hello = await self._hello()
        while hello[0] == "old" and hello[-1].isdigit():
            too_old.append("{}.{}".format(*divmod(int(hello[-1]), 100)))
            hello = await self._hello()
        if hello[0] != "python":
            oldest = ".".join(map(str, OLDEST_PYTHON))
            if too_old:
                raise UserError(
                    f"{self._host} has Python {', '.join(dict.fromkeys(too_old))}, and edgeglm needs "
                    f"{oldest} or newer; install one there "
                    "(for JetPack 5 see 'Without Python' in docs/jetson.md)"
                )
            raise UserError(f"{self._host} has no Python; install python3 {oldest} or newer there")
        if hello[-1] != "kept":
            source = agent_source()
            await self.write(f"{len(source)}\n".encode() + source)
        silence = ALIVE_SECONDS * ALIVE_COUNT
        await self.write(json.dumps({"root": root, "silence": silence}).encode() + b"\n")
        self.root = str((await self.answered())["root"])

    async def stay_heard(self) -> None:
        """Send an empty line now and then, but amid files: a device gives up who has fallen silent."""
        with contextlib.suppress(ConnectionLostError):
            while True:
                await asyncio.sleep(ALIVE_SECONDS)
                if self._early is None:
                    await self.write(b"\n")

    def close(self) -> None:
        """Wait for no answer any more."""
        if self._early is not None:
            self._early.cancel()
            if self._early.done() and not self._early.cancelled():
                self._early.exception()  # it was told in other words

    async def _hello(self) -> list[str]:
        """Return the words with which the interpreter there, or the lack of one, makes itself known."""
        line = await self._taken(self._process.stdout.readline())
        words = line.decode("utf-8", "replace").split()
        if words[:1] not in (["old"], ["python"], ["none"]):
            raise self._not_ours(line)
        return words

    async def _line(self) -> dict[str, Any]:
        line = await self._inflated_line()
        try:
            found = json.loads(line)
        except ValueError as error:
            raise self._not_ours(line) from error
        assert isinstance(found, dict)
        return found

    def _not_ours(self, line: bytes) -> UserError:
        words = line.decode("utf-8", "replace").strip()[:200]
        return UserError(
            f"{self._host} said {words!r} where edgeglm was to answer; "
            "let its shell's start-up files print nothing"
        )

    async def _inflated_line(self) -> bytes:
        """Return the next line of what the device's side says, however long."""
        seen = 0
        while (end := self._inflated.find(b"\n", seen)) < 0:
            seen = len(self._inflated)
            data = await self._taken(self._process.stdout.read(_PART_BYTES))
            try:
                self._inflated += self._inflating.decompress(data)
            except zlib.error as error:
                raise self._not_ours(data) from error
            if len(self._inflated) > _LONGEST_ANSWER:
                raise UserError(
                    f"{self._host} answered with more than {_LONGEST_ANSWER >> 20} MiB; "
                    "look at what lies in edgeglm's root there, or do not trust that device"
                )
        line = bytes(self._inflated[: end + 1])
        del self._inflated[: end + 1]
        return line

    async def _taken(self, reading: Awaitable[bytes]) -> bytes:
        """Return what was read. Raises ConnectionLostError at the end of it all."""
        try:
            data = await reading
        except (OSError, asyncssh_module().Error, asyncio.IncompleteReadError) as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost(await self._last_words())
        return data

    async def _last_words(self) -> str:
        with contextlib.suppress(Exception):
            data = await asyncio.wait_for(self._process.stderr.read(), 2)
            return " ".join(data.decode("utf-8", "replace").split())[-300:]
        return ""

    def _lost(self, why: object) -> ConnectionLostError:
        words = f" ({why})" if str(why) else ""
        return ConnectionLostError(
            f"the connection to {self._host} was lost{words}; "
            "run the same command again, it goes on from there"
        )


@asynccontextmanager
async def connected(host: HostName, *, root: str | None = None) -> AsyncIterator[Device]:
    """Open a connection and start the device's side. Raises UserError, ConnectionLostError."""
    async with _connection(host) as connection:
        asyncssh = asyncssh_module()
        try:
            process = await connection.create_process(agent_command(root), encoding=None)
        except (OSError, asyncssh.Error) as error:
            raise ConnectionLostError(f"{host} started no command ({error}); look at its sshd") from error
        device = Device(process, host)
        try:
            await device.open(root)
            heard = asyncio.ensure_future(device.stay_heard())
            try:
                yield device
            finally:
                heard.cancel()
        finally:
            device.close()
            process.close()


@asynccontextmanager
async def _connection(host: HostName) -> AsyncIterator[asyncssh.SSHClientConnection]:
    asyncssh = asyncssh_module()
    options = ssh_options(host, _CONNECT_SECONDS)
    address = options.host or host.host
    try:
        connection = await asyncio.wait_for(asyncssh.connect(address, options=options), _CONNECT_SECONDS + 5)
    except asyncssh.HostKeyNotVerifiable as error:
        raise host_key_error(host, options, error) from error
    except asyncssh.PermissionDenied as error:
        raise UserError(
            f"{host} refused user {options.username!r}: {error.reason or 'no key of yours is accepted'}; "
            "put your public key there (ssh-copy-id), or give user@host as it should be"
        ) from error
    except asyncssh.Error as error:
        raise ConnectionLostError(f"cannot talk to {host}: {error.reason}; try 'ssh {host}' first") from error
    except RecursionError as error:
        raise UserError(
            f"ProxyJump leads back to {host} itself; give the host on the way a 'ProxyJump none' above that"
        ) from error
    except UnicodeError as error:
        raise UserError(f"{host} is no name of a device ({error}); write it as ssh takes it") from error
    except ValueError as error:
        raise UserError(
            f"cannot read the known hosts or the SSH configuration for {host}: {error}; mend that line"
        ) from error
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise ConnectionLostError(f"{host} did not answer within {_CONNECT_SECONDS} s; is it on?") from error
    except OSError as error:
        raise ConnectionLostError(
            f"cannot reach {host}: {_reason(error)}; is it on, is the name right?"
        ) from error
    async with connection:
        yield connection


def _reason(error: OSError) -> str:
    """Return the system's words; asyncio's own name its internals."""
    import socket

    if error.errno is None or isinstance(error, socket.gaierror):
        return str(error.strerror or error)
    return os.strerror(error.errno)
