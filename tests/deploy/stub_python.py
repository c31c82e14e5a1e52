"""A device's Python environment that costs nothing: it answers `-m edgeglm...` as the real one does.

What the stand-in for the server does is written in recipe.toml: "never ready", "dies", or nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
REPOSITORY = Path("@REPOSITORY@")


def finalize(bundle: Path) -> None:
    import datetime
    import hashlib
    import re

    manifest = json.loads((bundle / "manifest.json").read_bytes())
    for name, record in manifest["files"].items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == record["sha256"], name
    behaviour = (bundle / "recipe.toml").read_text()
    onnx = manifest["files"]["models/int8/text.onnx"]["sha256"]
    folder = Path("bundle.finalized/engines") / onnx
    reused = (folder / "engine.plan").exists()
    folder.mkdir(parents=True, exist_ok=True)
    found = re.search(r"evidence of (\d+) bytes", behaviour)
    padding = " " * int(found[1]) if found else ""
    for name in ("engine.plan", "layers.json", "timing.cache", "build.log"):
        (folder / name).unlink(missing_ok=True)
        if name != "timing.cache" or "keeps no cache" not in behaviour:
            (folder / name).write_text(f"{name} of {manifest['content_digest']}{padding}")
    (folder / "engine.json").unlink(missing_ok=True)
    (folder / "engine.json").write_text(json.dumps({"onnx_sha256": onnx}))
    sys.stderr.write(json.dumps({"task": "finalize", "note": "fp32"}) + "\n")
    sys.stderr.flush()
    if found := re.search(r"finalize takes ([\d.]+) s", behaviour):
        time.sleep(float(found[1]))
    if "wrong answers" in behaviour:
        sys.stderr.write("error: no variant of colours answers here; build the bundle for this board anew\n")
        sys.exit(3)
    receipt = {
        "bundle": manifest["name"],
        "content_digest": manifest["content_digest"],
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "board": {"model": "Stub", "machine": "x86_64", "sm": None, "gpu": None, "l4t": None},
        "library": "onnxruntime",
        "library_version": "1.24.4",
        "chosen": "fp32",
        "evidence": "ONNX Runtime",
        "reused": reused,
    }
    (folder.parent.parent / "receipt.json").write_text(json.dumps(receipt))
    if "talks" in behaviour:
        sys.stdout.write("Welcome to this board\n")
    if "says little" in behaviour:
        receipt = {"library": "onnxruntime"}
    sys.stdout.write(json.dumps({"receipt": "receipt.json", **receipt}))


def note(bundle: Path, what: str) -> None:
    try:
        (bundle.parent / what).write_text(str(time.time()))
    except OSError:  # a hardened unit may write nothing there
        return


def serve(bundle: Path, arguments: list[str]) -> None:
    import http.server  # each start imports what it needs: twenty of these devices share a machine
    import re
    import signal
    import socket

    if "--when-told" in arguments:
        if not sys.stdin.readline():
            return
        note(bundle, "told")
    note(bundle, "opened")
    behaviour = (bundle / "recipe.toml").read_text()
    digest = json.loads((bundle / "manifest.json").read_bytes())["content_digest"]
    if "dies" in behaviour:
        sys.stderr.write("error: the engine of this bundle is broken; build it again\n")
        sys.exit(2)

    if found := re.search(r"loads for ([\d.]+) s", behaviour):
        time.sleep(float(found[1]))

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ready = "never ready" not in behaviour
            self.send_response(200 if ready else 503)
            self.end_headers()
            self.wfile.write(digest.encode())

        def log_message(self, *_: object) -> None:
            return

    def ended(*_: object) -> None:
        time.sleep(0.5)
        note(bundle, "ended")
        sys.exit()

    if "ends slowly" in behaviour:
        signal.signal(signal.SIGTERM, ended)
    host, port = arguments[arguments.index("--host") + 1], int(arguments[arguments.index("--port") + 1])
    http.server.ThreadingHTTPServer.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
    http.server.ThreadingHTTPServer((host, port), Answers).serve_forever()


def main(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        return
    module, rest = arguments[1], arguments[2:]
    if module == "edgeglm.deploy.device.supervise":
        sys.path.insert(0, str(REPOSITORY))
        sys.executable = str(HERE)
        import runpy

        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif module == "edgeglm.deploy.reference":
        value = json.loads((Path(rest[0]) / "metrics.json").read_text() or "{}").get("map10", 0.5)
        sys.stdout.write(json.dumps({"map10": value}))
    elif rest[0] == "finalize":
        finalize(Path(rest[1]))
    else:
        serve(Path(rest[1]), rest)


main(sys.argv[1:])
