"""Cut the classes and members that edgeglm uses out of the wheel ``tensorrt-stubs``.

The wheel cannot be installed as it is: it pins the bindings, and lines of it do not parse. Each class is
parsed alone, docstrings go, and a type that is not among the classes becomes Any.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "10.13.0.35.1"
SHA256 = "749a36a1f825db0800a82d0dabbf7ef49f3a9edc1e794c9545fb94a551613fea"
PLACE = Path(__file__).with_name("tensorrt") / "__init__.pyi"

WANTED: dict[str, tuple[str, ...]] = {
    "Builder": (
        "__init__", "create_network", "create_builder_config", "create_optimization_profile",
        "build_serialized_network",
    ),
    "BuilderFlag": ("REFIT", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"),
    "Dims": ("__getitem__", "__len__"),
    "EngineInspector": ("get_engine_information",),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS",),
    "IBuilderConfig": (
        "progress_monitor", "profiling_verbosity", "builder_optimization_level",
        "hardware_compatibility_level", "add_optimization_profile", "set_memory_pool_limit", "set_flag",
        "create_timing_cache", "set_timing_cache", "get_timing_cache",
    ),
    "ICudaEngine": (
        "weight_streaming_budget_v2", "get_weight_streaming_automatic_budget", "create_execution_context",
        "create_engine_inspector", "num_optimization_profiles", "device_memory_size_v2",
    ),
    "IExecutionContext": (
        "set_input_shape", "set_tensor_address", "get_tensor_shape", "execute_async_v3",
        "set_optimization_profile_async", "set_device_memory",
    ),
    "IHostMemory": ("nbytes",),
    "ILogger": ("__init__", "log"),
    "INetworkDefinition": ("num_inputs", "num_outputs", "get_input", "get_output"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("__init__", "phase_start", "step_complete", "phase_finish"),
    "ITensor": ("name", "dtype", "shape"),
    "ITimingCache": ("serialize",),
    "ExecutionContextAllocationStrategy": ("STATIC", "USER_MANAGED"),
    "LayerInformationFormat": ("JSON",),
    "MemoryPoolType": ("WORKSPACE",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("__init__", "num_errors", "parse_from_file", "get_error"),
    "ParserError": ("desc", "node", "node_name", "node_operator"),
    "ProfilingVerbosity": ("DETAILED",),
    "Runtime": ("__init__", "engine_host_code_allowed", "deserialize_cuda_engine"),
}  # fmt: skip
_KNOWN = {*WANTED, "int", "str", "bool", "float", "bytes", "tuple", "list", "dict", "None", "typing"}


class _Foreign(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return node if node.id in _KNOWN else ast.parse("typing.Any", mode="eval").body

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if ast.unparse(node) == "typing_extensions.Buffer":
            return ast.Name("bytes")
        return node if ast.unparse(node).startswith("typing.") else ast.parse("typing.Any", mode="eval").body

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.parse("typing.Any", mode="eval").body if node.value is ... else node


def wheel(folder: Path) -> Path:
    """Fetch the wheel by pip and return its path; pip refuses another digest."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"tensorrt-stubs=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "-d", str(folder), "-r", str(pinned)], check=True)
    return next(folder.glob("*.whl"))


def stub_from_wheel(path: Path) -> str:
    """Return the text of the cut stub."""
    with zipfile.ZipFile(path) as archive:
        source = archive.read("tensorrt_bindings/tensorrt.pyi").decode().replace("\r\n", "\n")
        licence = archive.read(f"tensorrt_stubs-{VERSION}.dist-info/licenses/LICENSE").decode()
    bodies = {m[1]: m[0] for m in re.finditer(r"^class (\w+)\b.*\n(?:(?:[ \t].*)?\n)*", source, re.MULTILINE)}
    head = [
        f"# Cut from tensorrt-stubs {VERSION} by scripts/tensorrt-stub: edit that and not this file.",
        "#",
        *(f"# {line}".rstrip() for line in licence.strip().splitlines()),
        "import typing",
        "",
        "__version__: str",
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(_cut(name, bodies[name]) for name in sorted(WANTED))


def _parsed(text: str) -> ast.ClassDef:
    lines = text.splitlines()
    while True:
        try:
            (found,) = ast.parse("\n".join(lines)).body
        except SyntaxError as error:  # "non-default argument follows default argument" is in the wheel
            at = (error.lineno or 0) - 1
            name = re.match(r"    def (\w+)\(", lines[at])
            if name is None:
                raise
            lines[at] = f"    def {name[1]}(self):"
        else:
            assert isinstance(found, ast.ClassDef)
            return found


def _cut(name: str, text: str) -> str:
    found = _parsed(text)
    kept: list[ast.stmt] = []
    for member in found.body:
        if isinstance(member, ast.FunctionDef) and member.name in WANTED[name]:
            member.body = [ast.Expr(ast.Constant(...))]
            for argument in (*member.args.args, *member.args.kwonlyargs):
                if argument.annotation is not None:
                    argument.annotation = _Foreign().visit(argument.annotation)
            if member.returns is not None:
                member.returns = _Foreign().visit(member.returns)
            kept.append(member)
        elif isinstance(member, ast.AnnAssign) and ast.unparse(member.target) in WANTED[name]:
            member.annotation = _Foreign().visit(member.annotation)
            kept.append(member)
    lacking = set(WANTED[name]) - {
        getattr(m, "name", "") or ast.unparse(getattr(m, "target", m)) for m in kept
    }
    if lacking:
        raise SystemExit(f"error: {name} of tensorrt-stubs {VERSION} has no {', '.join(sorted(lacking))}")
    found.body, found.bases, found.decorator_list = kept, [], []
    return ast.unparse(found) + "\n"


def main(arguments: list[str]) -> int:
    """Write the stub, or compare it."""
    with tempfile.TemporaryDirectory() as folder:
        text = stub_from_wheel(wheel(Path(folder)))
    if "--check" in arguments:
        if PLACE.read_text("utf-8") != text:
            sys.stderr.write(f"error: {PLACE.name} is not what the wheel gives; run scripts/tensorrt-stub\n")
            return 1
        return 0
    PLACE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
