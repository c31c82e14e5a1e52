"""The device's side as it travels: source, deflated, over the channel that it then speaks on.

Nothing has to be installed or written on a device before it can say what is wrong with it.
"""

from __future__ import annotations

import json
import shlex
import zlib
from collections.abc import Mapping
from functools import cache
from importlib import resources

_PACKAGES = ("edgeglm", "edgeglm.deploy", "edgeglm.deploy.device")
_MODULES = (
    "wire", "layout", "objects", "facts", "unit", "crontab", "supervise", "systemd", "service", "switch",
    "engines", "environment", "agent",
)  # fmt: skip

# Tries one interpreter after the other until one is new enough and becomes the agent. Each starts once: on a
# small board a start costs as much as a key exchange.
_START = """
for p in python3 python3.13 python3.12 python3.11 python3.10; do
  v=$(command -v $p 2>/dev/null) || continue
  "$v" -E -s -S -c "$EDGEGLM_LOADER"
  s=$?
  if [ $s -eq 0 ] || [ $s -gt 127 ]; then exit; fi
done
echo none
"""
# The first lines run in any Python, and 2.7 knows no -I. It ends with 0 whenever it was the agent.
_LOADER = """
import sys
n = sys.version_info[0] * 100 + sys.version_info[1]
if n < 310:
    sys.stdout.write("old %d\\n" % n)
    sys.exit(1)
sys.path[:] = [p for p in sys.path if p]
import importlib.util as u, json, zlib
class F:
    def __init__(self, s):
        self.s = s
    def find_spec(self, name, path=None, target=None):
        if name in self.s:
            return u.spec_from_loader(name, self, is_package=self.s[name] is None)
    def create_module(self, spec):
        return None
    def exec_module(self, m):
        exec(compile(self.s[m.__name__] or "", m.__name__, "exec"), m.__dict__)
try:
    sys.stdout.write("python %d\\n" % n)
    sys.stdout.flush()
    i = sys.stdin.buffer
    sys.meta_path.insert(0, F(json.loads(zlib.decompress(i.read(int(i.readline()))))))
    from edgeglm.deploy.device.agent import main
    main()
except BaseException as e:
    sys.excepthook(type(e), e, e.__traceback__)
    sys.exit(0)
"""


def agent_command() -> str:
    """Return what a device's shell is asked to run: it says who it is, then reads ``agent_source``."""
    command = f"EDGEGLM_LOADER={shlex.quote(_LOADER)}; export EDGEGLM_LOADER; {_START}"
    return f"exec sh -c {shlex.quote(command)}"


@cache
def agent_source() -> bytes:
    """Return the device's side: a deflated JSON object of its modules; None stands for a package."""
    folder = resources.files("edgeglm.deploy.device")
    sources: Mapping[str, str | None] = {
        **dict.fromkeys(_PACKAGES),
        **{f"{_PACKAGES[-1]}.{name}": (folder / f"{name}.py").read_text("utf-8") for name in _MODULES},
    }
    return zlib.compress(json.dumps(sources).encode(), 9)
