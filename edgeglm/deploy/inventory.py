"""The devices that were deployed to from here, in one SQLite file; and the manifests that they have."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgeglm.core.digest import sha256_bytes
from edgeglm.core.errors import UserError, unknown_name
from edgeglm.core.words import printable

if TYPE_CHECKING:
    from edgeglm.engines.board import Board

_SCHEMA = """
create table if not exists devices
  (name text primary key, seen real not null, root text, facts text not null);
create table if not exists manifests
  (sha256 text primary key, seen real not null, content blob not null);
"""
_KEPT_MANIFESTS = 64


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device as it was last seen.

    Attributes:
        name: As it is called on the command line.
        seen: Seconds since 1970.
        root: Where edgeglm lies there.
        board: In words.
        jetpack: Its major version, on a Jetson.
        tensorrt: By Python or by the package manager.
        serving: The slot that serves, with ``url``.
        slots: ``{slot: bundle, content digest, state, ...}``.
        receipt: The last one.
        free_bytes: What was free where ``root`` lies.
        kind: What makes its board comparable to others, as evidence is kept by.
        evidence: Where the newest evidence of such a board with the receipt's library lies here.
        error: Why it could not be asked just now; all else is then as it was last seen, if it ever was.
    """

    name: str
    seen: float
    root: str
    board: str
    machine: str
    python: str
    jetpack: str | None = None
    tensorrt: str | None = None
    service: str = ""
    serving: str | None = None
    ready: bool = False
    url: str | None = None
    slots: dict[str, dict[str, Any]] = {}
    receipt: dict[str, Any] = {}
    free_bytes: int = 0
    kind: dict[str, Any] = {}
    evidence: str = ""
    error: str = ""


class Inventory:
    """The file, opened for each call: several commands may run at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def seen(
        self,
        name: str,
        status: Mapping[str, Any],
        facts: Mapping[str, Any],
        board: Board,
        receipt: Mapping[str, Any] | None,
        *,
        root: str,
    ) -> DeviceRecord:
        """Remember what a device said; a former receipt stays where there is no new one."""
        from edgeglm.deploy.evidence import kind_of  # a rollback asks first, and imports these meanwhile
        from edgeglm.deploy.preflight import jetpack_of

        former = next((one for one in self.devices() if one.name == name), None)
        if receipt is None:
            receipt = former.receipt if former else {}
        libraries = dict(receipt).get("board", {}).get("libraries", {})
        state = status["service"]["state"]
        record = DeviceRecord(
            name=name,
            seen=time.time(),
            root=root,
            board=board.words,
            machine=board.machine,
            python=".".join(map(str, facts["python"])),
            jetpack=jetpack_of(board),
            tensorrt=libraries.get("tensorrt") or board.trtexec_version,
            service=status["service"].get("service", ""),
            serving=status["current"],
            ready=bool(state.get("ready")),
            url=url_of(state),
            slots=dict(status["slots"]),
            receipt=dict(receipt),
            free_bytes=int(status["free_bytes"]),
            kind=kind_of(board),
        )
        with self._open() as database:
            values = (name, record.seen, root, msgspec.json.encode(record).decode())
            database.execute("insert or replace into devices values (?, ?, ?, ?)", values)
        return record

    def devices(self) -> list[DeviceRecord]:
        """Return all devices by name; a row of another version of edgeglm is left out."""
        with self._open() as database:
            rows = database.execute("select facts from devices order by name").fetchall()
        found = []
        for (text,) in rows:
            try:
                found.append(msgspec.json.decode(text, type=DeviceRecord))
            except msgspec.MsgspecError:
                continue
        return found

    def root_of(self, name: str) -> str | None:
        """Return where edgeglm lies on a device that is known."""
        with self._open() as database:
            row = database.execute("select root from devices where name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def forget(self, name: str) -> None:
        """Drop a device. Raises UserError for an unknown one."""
        with self._open() as database:
            gone = database.execute("delete from devices where name = ?", (name,)).rowcount
        if not gone:
            raise unknown_name("device", name, [one.name for one in self.devices()])

    def remember_manifest(self, data: bytes) -> None:
        """Keep a manifest that a device has now: the next one may travel as what differs from it."""
        import zlib

        with self._open() as database:
            values = (sha256_bytes(data), time.time(), zlib.compress(data))
            database.execute("insert or replace into manifests values (?, ?, ?)", values)
            old = "select sha256 from manifests order by seen desc limit -1 offset ?"
            database.execute(f"delete from manifests where sha256 in ({old})", (_KEPT_MANIFESTS,))

    def manifest(self, digest: str) -> bytes | None:
        """Return a manifest that was kept, or None."""
        import zlib

        with self._open() as database:
            row = database.execute("select content from manifests where sha256 = ?", (digest,)).fetchone()
        return None if row is None else zlib.decompress(row[0])

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self._path, timeout=30)
            try:
                with database:
                    database.executescript(_SCHEMA)
                    yield database
            finally:
                database.close()
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"cannot use the inventory {self._path}: {error}; "
                "remove it to begin anew, or set EDGEGLM_STORE"
            ) from error


def url_of(state: Mapping[str, Any]) -> str | None:
    """Return where a server answers, by its supervisor's words; None where none runs."""
    if "port" not in state:
        return None
    host = printable(str(state["host"]))
    return f"http://[{host}]:{state['port']}" if ":" in host else f"http://{host}:{state['port']}"


def inventory_at(store: Path) -> Inventory:
    """Return the inventory that lies in a store's folder."""
    return Inventory(store / "devices.sqlite")
