"""A systemd of its own, in namespaces of its own: the real program as process 1, with no unit of the host's.

It has this machine's network and files, but its own /run, /var/log, control groups and unit folders. /srv is
what a test puts there: services with ProtectHome and PrivateTmp see neither homes nor /tmp. Mounts are shared
within, as who starts a container has them: by one a credential is handed over.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_JOURNAL = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")
_TARGETS = (
    "sysinit",
    "basic",
    "multi-user",
    "default",
    "shutdown",
    "sockets",
    "local-fs",
    "network",
    "umount",
)
_EMPTY = (
    "/etc/systemd/system",
    "/etc/systemd/user",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system-generators",
    "/usr/lib/systemd/system-preset",
    "/var/log",
    "/var/lib",
)
_BOOT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
for place in /run {empty}; do [ ! -d "$place" ] || mount -t tmpfs tmpfs "$place"; done
mkdir -p /run/sshd /run/user/0
mount --bind {units} /usr/lib/systemd/system
mount --bind {user_units} /usr/lib/systemd/user
mount --rbind {srv} /srv
{binds}
umount -R /sys/fs/cgroup
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup/memory
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory
mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
mount --make-rshared /
exec env -i container=edgeglm PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  {program} --system --unit=multi-user.target --log-target=console --show-status=no
"""


class Booted:
    """A running systemd. ``files`` is its root as this process sees it."""

    def __init__(self, process_1: int) -> None:
        self.process_1 = process_1
        self.files = Path(f"/proc/{process_1}/root")

    @property
    def enter(self) -> list[str]:
        """What goes before a command that runs in there."""
        return ["nsenter", "-t", str(self.process_1), "-m", "-p", "-C", "-u", "-i", "--"]

    def run(self, *command: str) -> str:
        """Run a command in there and return what it printed; whether it failed is not asked."""
        done = subprocess.run([*self.enter, *command], capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip()


@contextmanager
def booted(folder: Path, srv: Path, binds: Mapping[str, Path], program: str) -> Iterator[Booted]:
    """Boot it with ``srv`` as /srv, and ``binds`` as ``{name below /srv: folder}``."""
    units, user_units = folder / "units", folder / "user-units"
    for place in (units, user_units):
        place.mkdir(parents=True)
        for name in _TARGETS:
            (place / f"{name}.target").write_text(
                f"[Unit]\nDescription={name}\nDefaultDependencies=no\nAllowIsolate=yes\n"
            )
    (units / "system.slice").write_text("[Unit]\nDefaultDependencies=no\n")
    with (units / "multi-user.target").open("a") as file:
        file.write(f"Wants={' '.join(_JOURNAL)}\n")
    for name in _JOURNAL:
        (units / name).write_bytes(Path("/usr/lib/systemd/system", name).read_bytes())
    lines = []
    for name, place in binds.items():
        (srv / name).mkdir()
        lines.append(f"mount --bind {place} /srv/{name}")
    text = _BOOT.format(
        empty=" ".join(_EMPTY),
        units=units,
        user_units=user_units,
        srv=srv,
        binds="\n".join(lines),
        program=program,
    )
    spaces = ["--fork", "--pid", "--kill-child", "--mount", "--cgroup", "--uts", "--ipc"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["unshare", *spaces, "sh", "-c", text], stdout=log, stderr=log)
        try:
            yield Booted(_process_1(process, folder / "log"))
        finally:
            process.kill()
            process.wait(20)


def _process_1(process: subprocess.Popen[bytes], log: Path) -> int:
    """Wait until systemd answers, and return its number outside."""
    for _ in range(400):
        assert process.poll() is None, log.read_text()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            found = Booted(int(children[0]))
            if "LANG" in found.run("systemctl", "show-environment"):
                found.run("systemctl", "log-target", "journal")
                return found.process_1
        time.sleep(0.05)
    raise AssertionError(f"systemd did not start: {log.read_text()}")
