"""The device's side of a deploy: one question a line, answered in order, under one lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeglm.deploy.device import engines, environment, objects, switch
from edgeglm.deploy.device.facts import facts, free_bytes
from edgeglm.deploy.device.kept import keep_source
from edgeglm.deploy.device.layout import SLOTS, Layout, Lock, read_json, sync_all
from edgeglm.deploy.device.service import Service, best_kind, service_for
from edgeglm.deploy.device.wire import Refused, SenderGone, Wire

ROOT_VARIABLE = "EDGEGLM_ROOT"
_SYSTEM_ROOT = Path("/var/lib/edgeglm")
_POLL_SECONDS = 0.05
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Message = dict[str, Any]


class Agent:
    """Answers one sender."""

    def __init__(self, wire: Wire, root: Path, source: bytes | None) -> None:
        self.wire = wire
        self.layout = Layout(root)
        self.source = source
        self.lock: Lock | None = None

    def answer(self, question: Message) -> Message:
        """Answer one question. Raises Refused, SenderGone, OSError."""
        names: dict[str, Callable[[Message], Message]] = {
            "facts": lambda _: {**facts(self.layout.root), "best_service": best_kind()},
            "status": lambda _: self.status(),
            "lock": self.take_lock,
            "missing": self.missing,
            "receive": lambda _: {"received": objects.receive(self.layout, self.wire)},
            "environment": self.make_environment,
            "assemble": self.assemble,
            "run": self.run,
            "read": self.read,
            "mark": lambda q: self.layout.write_record(q["slot"], **q["fields"]),
            "activate": self.activate,
            "rollback": self.rollback,
            "collect": lambda _: objects.collect(self.layout),
            "logs": self.logs,
            "remove": self.remove,
        }
        if question["ask"] not in ("facts", "status", "lock", "logs") and self.lock is None:
            raise Refused("the device was not locked first; use the same version of edgeglm on both sides")
        return names[question["ask"]](question)

    def status(self) -> Message:
        """Say what lies in the slots and what serves."""
        layout = self.layout
        service = self._service().state()
        return {
            "current": layout.pointed("current"),
            "previous": layout.pointed("previous"),
            "slots": {slot: _brief(record) for slot in SLOTS if (record := layout.record(slot))},
            "service": {**switch.settings_in_force(layout), "state": service},
            "timing_caches": engines.has_timing_caches(layout),
            "free_bytes": free_bytes(layout.root),
            "switching": bool(read_json(layout.root / "switching.json")),
        }

    def take_lock(self, question: Message) -> Message:
        """Be the one deployer, and end what a former one left unfinished.

        Only who asks to ``create`` makes a root. ``settings`` are held against what can be had here, before
        anything has come that would be served by them.
        """
        layout = self.layout
        while self.lock is None:
            if question.get("create"):
                layout.make()
            else:
                self._check_root()
            lock = Lock(layout.root)
            lock.take(str(question["owner"]), float(question["seconds"]), self.wire.gone)
            if lock.is_there():  # else who had it has removed the root, and another may have made it anew
                self.lock = lock
        if self.source is not None:
            keep_source(layout.root, self.source)
        recovered = switch.recover(layout)
        if settings := question.get("settings"):
            switch.check_settings(layout, settings)
        return {"recovered": recovered, "manifests": objects.manifests(layout), **self.status()}

    def missing(self, question: Message) -> Message:
        """Say which objects must still come: those of the manifest, and others that are named."""
        wanted = [(str(digest), int(size)) for digest, size in question.get("objects", ())]
        if digest := question.get("manifest"):
            manifest = read_json(objects.object_path(self.layout, digest))
            wanted += objects.wanted_files(manifest).values()
        name = question.get("environment")
        complete = name is not None and environment.is_complete(self.layout, name)
        if name is not None and not complete:
            wanted += [(str(digest), int(size)) for digest, size in question["wheels"]]
        lacking = objects.missing(self.layout, wanted)
        sizes = dict(wanted)
        needed = sum(sizes[one["sha256"]] - one["have"] for one in lacking)
        return {"missing": lacking, "needed_bytes": needed, "environment_complete": complete}

    def make_environment(self, question: Message) -> Message:
        """Make the Python environment, if it is not there."""
        python = environment.made(self.layout, question["name"], question["wheels"], self._say)
        return {"python": python}

    def assemble(self, question: Message) -> Message:
        """Make a bundle of objects in the spare slot; finished engines that it may use come along."""
        layout, slot = self.layout, self.layout.spare()
        folder = layout.slots / slot
        manifest_sha = str(question["manifest"])
        parts = {"manifest.json": manifest_sha, **question.get("beside", {})}
        files = objects.wanted_files(read_json(objects.object_path(layout, manifest_sha)))
        parts.update({name: digest for name, (digest, _) in files.items()})
        used = sorted({*parts.values(), *question.get("reference", {}).values()})
        engines.cleared(folder, used)
        (folder / "bundle").mkdir(parents=True)
        for name, digest in parts.items():
            objects.linked(objects.object_path(layout, digest), folder / "bundle" / name)
        for name, digest in question.get("reference", {}).items():
            objects.linked(objects.object_path(layout, digest), folder / "reference" / name)
        if question.get("borrow"):
            environment.borrowed(folder, question["borrow"])
        else:
            (folder / "environment").symlink_to(Path("../../environments") / question["environment"])
        engines.brought(layout, folder, used, question.get("engines", {}))
        record = {"state": "begun", "objects": used, "manifest_sha256": manifest_sha, "begun": time.time()}
        sync_all(layout.root)
        layout.write_record(slot, **record, environment=question.get("environment"), **question["record"])
        objects.collect(layout, coming=slot)  # bundles that fail, one after the other, would fill the disk
        return {"slot": slot}

    def run(self, question: Message) -> Message:
        """Run a program of the slot's environment there; what it writes to stderr is streamed back.

        It ends when the sender or this goes: what it finished is found again by the next run.
        """
        folder = self.layout.slots / question["slot"]
        command = [str(folder / "environment" / "bin" / "python"), *question["arguments"]]
        quiet = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        child = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**quiet, "EDGEGLM_PROGRESS": "lines"},
            start_new_session=True,
            preexec_fn=environment.ends_with_us,
        )
        assert child.stdout is not None
        assert child.stderr is not None
        spoken: list[str] = []
        output: list[bytes] = []
        stderr, stdout = child.stderr, child.stdout

        def follow() -> None:
            for raw in stderr:
                line = raw.decode("utf-8", "replace").rstrip()
                spoken.append(line)
                self.wire.send({"line": line})

        readers = [
            threading.Thread(target=follow, daemon=True),
            threading.Thread(target=lambda: output.append(stdout.read()), daemon=True),
        ]
        for reader in readers:
            reader.start()
        while child.poll() is None:
            if self.wire.gone():
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
                raise SenderGone
            time.sleep(_POLL_SECONDS)
        for reader in readers:
            reader.join()
        words = [line for line in spoken if line and not line.startswith("{")]
        return {
            "code": child.returncode,
            "stdout": b"".join(output).decode("utf-8", "replace"),
            "words": words[-20:],
        }

    def read(self, question: Message) -> Message:
        """Return small files below a slot, by pattern: texts as they are, others in base64."""
        import base64

        folder = (self.layout.slots / question["slot"]).resolve()
        texts, files = dict[str, str](), dict[str, str]()
        for pattern in question["patterns"]:
            for path in sorted(folder.glob(pattern)):
                if path.is_file() and path.stat().st_size <= int(question["limit"]):
                    name, data = path.relative_to(folder).as_posix(), path.read_bytes()
                    try:
                        texts[name] = data.decode()
                    except UnicodeDecodeError:
                        files[name] = base64.b64encode(data).decode()
        return {"texts": texts, "files": files}

    def activate(self, question: Message) -> Message:
        """Serve a slot. Once begun it is brought to its end, also when the sender goes."""
        seconds, settings = float(question["seconds"]), question.get("settings")
        return switch.activate(self.layout, question["slot"], seconds, settings)

    def rollback(self, question: Message) -> Message:
        """Serve what was served before; say what this device is, which is found out meanwhile."""
        slot = self.layout.pointed("previous")
        if slot is None or self.layout.record(slot).get("state") != "ready":
            raise Refused("there is no former bundle on this device to go back to; deploy one")
        said: Message = {}
        asking = threading.Thread(target=lambda: said.update(facts(self.layout.root)), daemon=True)
        asking.start()
        found = switch.activate(self.layout, slot, question["seconds"])
        asking.join()
        return {**found, "facts": said, "status": self.status()}

    def logs(self, question: Message) -> Message:
        """Return the last lines that the server wrote."""
        self._check_root()
        return {"lines": self._service().log(int(question["lines"]))}

    def remove(self, question: Message) -> Message:
        """Remove everything that is edgeglm's, or with ``old`` only what does not serve."""
        layout = self.layout
        if question.get("old"):
            if (current := layout.pointed("current")) is not None:
                layout.point("previous", None)
                for slot in SLOTS:
                    if slot != current:
                        objects.remove_tree(layout.slots / slot)
            if damaged := objects.damaged_slots(layout):
                raise Refused(
                    f"the record of slot {damaged[0]} is damaged, what it needs is not known; "
                    "deploy again, then remove"
                )
            return objects.collect(layout)
        self._service().remove()
        size, left = layout.remove()
        return {"removed": 1, "bytes": size, "left": left}

    def _check_root(self) -> None:
        if not self.layout.is_ours():
            raise Refused(
                f"there is no edgeglm in {self.layout.root} on the device; "
                "name with --root where it was deployed to"
            )

    def _service(self) -> Service:
        return service_for(self.layout, switch.settings_in_force(self.layout))

    def _say(self, text: str) -> None:
        self.wire.send({"line": text})


def _brief(record: Message) -> Message:
    return {name: value for name, value in record.items() if name != "objects"}


def _explained(error: OSError, root: Path) -> Refused:
    place = error.filename or root
    if error.errno in _FULL:
        remedy = "free some space there ('edgeglm remove --old' drops the former bundle) or pass --root"
    elif error.errno == errno.EROFS:
        remedy = "mount it for writing or pass --root"
    else:
        remedy = "give that user the right to, or pass --root"
    return Refused(f"cannot use {place} on the device: {error.strerror}; {remedy}")


def default_root() -> Path:
    """Return ``$EDGEGLM_ROOT``, the system's place for root under systemd, or a folder of the user."""
    if named := os.environ.get(ROOT_VARIABLE):
        return Path(named)
    if os.getuid() == 0 and best_kind() == "system":
        return _SYSTEM_ROOT
    return Path.home() / ".local" / "share" / "edgeglm"


def main(source: bytes | None) -> None:
    """Answer until the sender goes. Its first line names the root; ``source`` is this, if it had to come."""
    os.umask(0o022)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.environ.pop("EDGEGLM_LOADER", None)  # it has done its work
    wire = Wire(sys.stdin.buffer, sys.stdout.buffer)
    first = wire.receive()
    if first is None:
        return
    wire.give_up_after(float(first["silence"]))
    with suppress(SenderGone):
        _answer_all(wire, first, source)


def _answer_all(wire: Wire, first: Message, source: bytes | None) -> None:
    try:
        root = Path.home() / Path(first["root"]).expanduser() if first.get("root") else default_root()
    except RuntimeError:
        words = f"the device has no user whose home {first['root']} could be in; pass another --root"
        wire.send({"refused": words, "code": 2})
        return
    agent = Agent(wire, root, source)
    wire.send({"answer": {"root": str(root)}})
    while (question := wire.receive()) is not None:
        try:
            wire.send({"answer": agent.answer(question)})
        except Refused as error:
            wire.send({"refused": str(error), "code": error.code})
        except SenderGone:
            raise
        except Exception as error:
            if not isinstance(error, OSError):  # what only we can get wrong; it must be heard all the same
                wire.send({"broken": f"{type(error).__name__}: {error}"})
                return
            refused = _explained(error, root)
            wire.send({"refused": str(refused), "code": refused.code})
        else:
            continue
        if question["ask"] == "receive":  # what follows are bytes of files, and no questions
            wire.drain()
            return
