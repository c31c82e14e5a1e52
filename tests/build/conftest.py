"""One project and one store for all whole builds of this folder: each stage is made once."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the host half is not installed")
pytest.importorskip("modelopt", reason="the host half is not installed")

#: So few steps that a build takes seconds. A process of its own is told the same.
STEPS = {
    "edgeglm.adapt.alignment.MIN_STEPS": 30,
    "edgeglm.adapt.alignment.MIN_LORA_STEPS": 4,
    "edgeglm.distill.image_student.MIN_STEPS": 20,
    "edgeglm.distill.text_student.MIN_STEPS": 60,
}


@dataclass(frozen=True)
class Said:
    """What a command line gave: its code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def ran(self) -> list[str]:
        """The stages that were run and not reused."""
        return [stage["stage"] for stage in self.json["stages"] if not stage["reused"]]


@dataclass(frozen=True)
class Project:
    """A folder with towers, pairs and a recipe, and the store that its builds share."""

    root: Path
    store: Path

    @property
    def here(self) -> Path:
        """The working folder of every command line; nothing may be left in it."""
        folder = self.root / "here"
        folder.mkdir(exist_ok=True)
        return folder

    def arguments(self, verb: str, target: str, *more: str) -> list[str]:
        return [verb, "--recipe", str(self.root / "recipe.toml"), "--target", target, *more]

    def edgeglm(self, *arguments: object) -> Said:
        """Run one command line in this process."""
        from edgeglm.cli import main as cli

        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setenv("EDGEGLM_STORE", str(self.store))
            patch.delenv("EDGEGLM_TRACEBACK", raising=False)
            patch.chdir(self.here)
            code = cli.exit_code([str(argument) for argument in arguments])
        return Said(code, out.getvalue(), err.getvalue())

    def build(self, target: str, *more: str, output: Path | None = None) -> Said:
        place = output or self.root / "bundles" / target
        return self.edgeglm(
            *self.arguments("build", target, "--threads", "1", "--json", "--output", str(place), *more)
        )

    def process(self, *arguments: str) -> subprocess.Popen[str]:
        """Start one command line as a process of its own."""
        lines = ["import importlib, signal, sys"]
        for name, value in STEPS.items():
            module, _, constant = name.rpartition(".")
            lines.append(f"importlib.import_module({module!r}).{constant} = {value}")
        paying = "lambda *_, **__: lambda _: 1.5"
        lines.append(f"importlib.import_module('edgeglm.calibration.towers').speedup_over = {paying}")
        lines += [
            "signal.signal(signal.SIGINT, signal.default_int_handler)",
            "from edgeglm.cli.main import main",
            "main(sys.argv[1:])",
        ]
        return subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines), *arguments],
            env={**os.environ, "EDGEGLM_STORE": str(self.store)},
            cwd=self.here,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def stored(self) -> set[str]:
        """The kinds of the finished entries of the store."""
        entries = (self.store / "entries").glob("*/entry.json")
        return {json.loads(path.read_text())["kind"] for path in entries}


@pytest.fixture(scope="session", autouse=True)
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in STEPS.items():
            patch.setattr(name, value)
        # Towers this small may be slower in INT8, and which scheme is faster changes from run to run.
        patch.setattr("edgeglm.calibration.towers.speedup_over", lambda *_, **__: lambda _: 1.5)
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    from tests.tiny_towers import write_project

    root = tmp_path_factory.mktemp("project")
    return Project(write_project(root), tmp_path_factory.mktemp("project-store"))


@pytest.fixture(scope="session")
def cold(project: Project) -> Said:
    """The first build of the project: target cpu, nothing stored."""
    said = project.build("cpu")
    assert said.code == 0, said.err
    return said


@pytest.fixture(scope="session")
def bundle(project: Project, cold: Said) -> Path:
    """The bundle of the first build."""
    return Path(cold.json["bundle"])


@pytest.fixture(scope="session")
def end() -> Callable[[subprocess.Popen[str], signal.Signals], tuple[str, str]]:
    """Return a function that sends a signal and waits for the process."""

    def ended(process: subprocess.Popen[str], number: signal.Signals) -> tuple[str, str]:
        process.send_signal(number)
        return process.communicate(timeout=60)

    return ended
