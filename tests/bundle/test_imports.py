from __future__ import annotations

import subprocess
import sys

ROOMS = ("bundle.pack", "bundle.verify", "bundle.goldens", "bundle.inspect", "runtime.retrieval")
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "PIL", "tokenizers", "modelopt", "zstandard"}


def test_a_device_opens_a_bundle_without_any_host_library():
    """A device's environment has none of these, and the command line must start at once."""
    program = (
        "import sys\n"
        + "".join(f"import edgeglm.{room}\n" for room in ROOMS)
        + f"print(*sorted({HEAVY} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
