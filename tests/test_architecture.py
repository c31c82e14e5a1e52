"""What holds of the whole house: who imports whom, and what a device must never need."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib

from tests.skips import loud_skip, mount_small_disk

HOST_ONLY = ("torch", "transformers", "peft", "modelopt", "onnx", "onnxscript", "matplotlib", "resvg_py")
DEVICE_LATE = ("onnxruntime", "tokenizers", "PIL", "faiss", "tensorrt", "tensorrt_rtx", "pycuda")
DEVICE_ROOMS = (
    "core",
    "targets",
    "engines",
    "evaluate",
    "bundle",
    "compile",
    "runtime",
    "index",
    "serve",
    "bench",
    "deploy",
    "cli",
)
X86_ONLY = {"atheris", "mlperf_loadgen", "tensorrt_rtx_bindings"}
IN_NO_LOCK = {"presidio_analyzer"}
DEVICE_MODULES = ("edgeglm.data.transforms", "edgeglm.data.tokenization")

_IMPORT_UNDER_A_BAN = """
import importlib, pkgutil, sys

banned = set(sys.argv[1].split(","))

class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in banned:
            raise ImportError(f"{name} is banned here")
        return None

sys.meta_path.insert(0, Ban())
names = sys.argv[3].split(",")
for room in sys.argv[2].split(","):
    package = importlib.import_module(f"edgeglm.{room}")
    names += [f"edgeglm.{room}"]
    names += [module.name for module in pkgutil.walk_packages(package.__path__, f"edgeglm.{room}.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_no_room_imports_upward_or_sideways(repository: Path):
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [program, "--no-cache"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_device_without_torch_and_without_any_runtime_imports_its_whole_half(repository: Path):
    # `compile` may import onnx late; at import nothing heavy is allowed anywhere in the half.
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            _IMPORT_UNDER_A_BAN,
            ",".join((*HOST_ONLY, *DEVICE_LATE)),
            ",".join(DEVICE_ROOMS),
            ",".join(DEVICE_MODULES),
        ],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


def test_a_bare_checkout_cannot_import_a_second_copy_of_a_linked_package(repository: Path):
    for name in ("export", "calibration", "targets"):
        result = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            cwd=repository,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        assert f"edgeglm.{name}" in result.stderr
        assert importlib.import_module(f"edgeglm.{name}").__name__ == f"edgeglm.{name}"


def test_the_linked_packages_are_links_to_the_folders_at_the_top(repository: Path):
    for name in ("export", "calibration", "targets"):
        link = repository / "edgeglm" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert link.resolve() == repository / name


def test_onnxruntime_comes_once_in_each_half(repository: Path):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    assert not any(line.startswith("onnxruntime") for line in (*base, *extras["build"]))
    for lock in (repository / "scripts" / "locks").glob("*.txt"):
        runtimes = [line for line in lock.read_text().splitlines() if line.startswith("onnxruntime")]
        assert len(runtimes) == 1, lock.name
        assert runtimes[0].startswith("onnxruntime-gpu==") == lock.name.startswith("host"), lock.name


def test_a_lock_names_versions_and_digests_and_no_place(repository: Path):
    locks = sorted((repository / "scripts" / "locks").glob("*.txt"))
    assert {lock.name.partition("-")[0] for lock in locks} == {"host", "device"}
    for lock in locks:
        lines = lock.read_text().splitlines()
        assert lines[0].startswith("# The ")
        for line in lines[1:]:
            name, _, digest = line.partition(" --hash=sha256:")
            assert "==" in name, line
            assert len(digest) == 64, line
        assert not any(line.startswith(("torch==", "nvidia-cu", "triton==")) for line in lines), lock.name


def test_a_lock_satisfies_what_pyproject_asks_for(repository: Path):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    for lock in (repository / "scripts" / "locks").glob("*.txt"):
        half, python, machine = lock.stem.split("-")
        place = {"python_version": f"3.{python[3:]}", "platform_machine": machine, "extra": ""}
        pins = dict(line.split(" ")[0].split("==") for line in lock.read_text().splitlines()[1:])
        extras = ("build", "dev") if half == "host" else ("device",)
        for line in [
            *project["dependencies"],
            *(line for extra in extras for line in project["optional-dependencies"][extra]),
        ]:
            need = Requirement(line)
            if need.name == "torch" or (need.marker is not None and not need.marker.evaluate(place)):
                continue
            assert need.specifier.contains(pins[canonicalize_name(need.name)]), f"{lock.name}: {line}"


def test_the_package_names_the_pythons_that_have_a_lock(repository: Path):
    classifiers = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["classifiers"]
    named = {line.rpartition(".")[2] for line in classifiers if ":: Python :: 3." in line}
    locks = (repository / "scripts" / "locks").glob("*-py3*.txt")
    assert named == {lock.name.partition("-py3")[2].partition("-")[0] for lock in locks}


def test_setup_installs_the_torch_that_pyproject_asks_for(repository: Path):
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pin,) = [line.partition(";")[0] for line in extras["build"] if line.startswith("torch==")]
    assert f" {pin}\n" in (repository / "scripts" / "setup").read_text()


def test_an_absent_system_part_skips_loudly_here_and_fails_in_ci(
    require_system: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("EDGEGLM_CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="SYSTEM PART ABSENT: no-such-program"):
        require_system("no-such-program")
    monkeypatch.setenv("EDGEGLM_CI", "1")
    with pytest.raises(pytest.fail.Exception, match="In CI this is a failure"):
        require_system("no-such-program")
    assert Path(require_system("sh")).name == "sh"


def test_every_library_that_tests_skip_for_is_here_but_those_in_no_lock(repository: Path):
    """So that the host half, whose lock has them, is never tested without one of them."""
    skipped_for = {
        found
        for path in (repository / "tests").rglob("*.py")
        for found in re.findall(r"importorskip\(\s*\"(\w+)", path.read_text("utf-8"))
    }
    assert {"torch", "modelopt", "onnxruntime"} <= skipped_for
    elsewhere = set() if platform.machine() == "x86_64" else X86_ONLY
    wanted = skipped_for - IN_NO_LOCK - elsewhere
    absent = sorted(name for name in wanted if importlib.util.find_spec(name) is None)
    if absent:
        loud_skip(f"NOT INSTALLED: {', '.join(absent)}; their tests are skipped")


def test_a_small_disk_that_cannot_be_mounted_fails_ci_where_it_is_root(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("EDGEGLM_CI", "1")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(pytest.fail.Exception, match=r"to mount a small disk .* In CI this is a failure"):
        mount_small_disk(tmp_path / "nowhere", "size=1m")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="nor is it by a CI that is not root"):
        mount_small_disk(tmp_path / "nowhere", "size=1m")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    outputs = {"build", "dist", "bundles", "tests", "docs"}  # at the top: edgeglm/build is a room
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")

    def left_out(directory: str, names: list[str]) -> set[str]:
        return ignored(directory, names) | (outputs if Path(directory) == repository else set())

    shutil.copytree(repository, source, symlinks=True, ignore=left_out)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, folder],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


def test_a_wheel_puts_nothing_but_edgeglm_into_site_packages(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"edgeglm"}


def test_a_wheel_holds_the_code_and_data_of_every_room(wheel: Path, repository: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        f"edgeglm/{path.relative_to(repository / 'edgeglm').as_posix()}"
        for room in (repository / "edgeglm").iterdir()
        for path in (room.rglob("*") if room.is_dir() else [room])
        if path.suffix in (".py", ".toml", ".html", ".css", ".js", ".typed", ".txt", ".sh")
        or path.name == "py.typed"
    }
    assert sources - names == set()
    assert "edgeglm/py.typed" in names
    assert "edgeglm/targets/profiles/t4.toml" in names


@pytest.mark.assets
def test_the_device_lock_alone_runs_the_command_line(wheel: Path, tmp_path: Path, repository: Path):
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    lock = repository / "scripts" / "locks" / f"device-{version}-{platform.machine()}.txt"
    if not lock.exists():
        loud_skip(f"no {lock.name}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install: list[str | Path] = [python, "-m", "pip", "install", "-qq", "--no-compile", "--no-deps"]
    subprocess.run([*install, "--require-hashes", "-r", lock], check=True, env=environment)
    subprocess.run([*install, wheel], check=True, env=environment)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python.with_name("edgeglm"), *arguments],
            cwd=tmp_path,
            env={**environment, "EDGEGLM_STORE": str(tmp_path / "store")},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("--help").returncode == 0
    targets = run("targets")
    assert targets.returncode == 0, targets.stderr
    assert "jetson-agx" in targets.stdout
    doctor = run("doctor")
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    missing = (
        "import importlib.util as u; "
        "print([name for name in ('torch', 'transformers', 'modelopt', 'onnx') if u.find_spec(name)])"
    )
    absent = subprocess.run([python, "-c", missing], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert absent.stdout.strip() == "[]"
