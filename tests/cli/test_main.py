from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from edgeglm import __version__
from edgeglm.cli import main as cli
from edgeglm.core.errors import GateError, UserError

FOLDER = Path(cli.__file__).parent
WRITTEN = [name for name in cli.COMMANDS if (FOLDER / f"{name.replace('-', '_')}.py").exists()]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeglm", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_lists_every_command_and_imports_none():
    code = (
        "import sys\nfrom edgeglm.cli.main import exit_code\ncode = exit_code(['--help'])\n"
        "print(*sys.modules, sep='\\n', file=sys.stderr)\nsys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    loaded = set(result.stderr.split())
    assert loaded.isdisjoint({"numpy", "torch", "onnxruntime", "rich", "msgspec", "PIL"})
    assert loaded.isdisjoint({f"edgeglm.cli.{name}" for name in cli.COMMANDS})
    for name, text in cli.COMMANDS.items():
        assert name in result.stdout
        assert text in " ".join(result.stdout.split()), "it may be wrapped"


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run("--help")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0, "0.1 s on an idle machine; the limit leaves room for a busy one"


@pytest.mark.parametrize("name", WRITTEN)
def test_each_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    assert cli.exit_code([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: edgeglm {name}")
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize("name", WRITTEN)
def test_each_command_can_answer_in_json(name: str):
    def has_json(command: click.Command) -> bool:
        if isinstance(command, click.Group):
            return all(has_json(inner) for inner in command.commands.values())
        return any("--json" in parameter.opts for parameter in command.params)

    command = cli.group.get_command(click.Context(cli.group), name)
    assert command is not None
    assert has_json(command)


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"edgeglm {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bild"], "did you mean 'build'?"),
        (["zzz"], "see edgeglm --help"),
        (["cache", "gc", "--quote", "1GB"], "see edgeglm cache gc --help"),
        (["cache", "gc", "--quota", "lots"], "write it like 5GB"),
        (["targets", "jetson-agz"], "did you mean 'jetson-agx'?"),
        (["run", "bundle"], "give either --query TEXT or --image FILE"),
        (["run", "bundle", "-k", "0", "--query", "x"], "see edgeglm run --help"),
        (["run", "bundle", "--query", "x", "--threads", "20000"], "1<=x<=256"),
        (["evaluate", "bundle", "--threads", "20000"], "1<=x<=256"),
        (["inspect", "no-such-bundle"], "no-such-bundle"),
        (["verify", "no-such-bundle"], "no-such-bundle"),
        (["report", "no-such-bundle"], "no-such-bundle"),
    ],
)
def test_bad_input_exits_with_2_and_one_message(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.exit_code(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize("group", [[], ["index"], ["cache"]])
def test_a_group_without_a_command_shows_its_help_and_calls_it_no_error(
    group: list[str], capsys: pytest.CaptureFixture[str]
):
    cli.exit_code(group)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).startswith("Usage: edgeglm")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no pairs; add some"), 2, "error: no pairs; add some\n"),
        (GateError("below the gate; train longer"), 3, "error: below the gate; train longer\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 2, "/out/x: No space left"),
        (OSError(errno.EROFS, "Read-only file system", "/out/x"), 2, "choose a folder that can be written"),
        (OSError(errno.EIO, "Input/output error"), 1, "unexpected OSError"),
        (KeyError("x"), 1, "unexpected KeyError: 'x'; set EDGEGLM_TRACEBACK=1"),
        (ModuleNotFoundError("no", name="torch.nn"), 2, "pip install 'edgeglm[build]'"),
        (ModuleNotFoundError("no", name="tokenizers"), 2, "pip install 'edgeglm[device]'"),
        (ModuleNotFoundError("no", name="prometheus_client"), 2, "pip install 'edgeglm[serve]'"),
        (ModuleNotFoundError("no", name="python_multipart"), 2, "pip install 'edgeglm[serve]'"),
        (ModuleNotFoundError("no", name="edgeglm.x"), 1, "unexpected ModuleNotFoundError"),
    ],
)
def test_every_failure_has_its_code_and_no_traceback(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch
):
    @click.command()
    def failing() -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: failing)
    monkeypatch.delenv("EDGEGLM_TRACEBACK", raising=False)
    assert cli.exit_code(["build"]) == code
    text = capsys.readouterr().err
    assert words in text
    assert "Traceback" not in text


def test_the_traceback_is_there_for_those_who_ask(capsys: pytest.CaptureFixture[str], monkeypatch):
    @click.command()
    def failing() -> None:
        raise KeyError("x")

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: failing)
    monkeypatch.setenv("EDGEGLM_TRACEBACK", "1")
    assert cli.exit_code(["build"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_reader_that_leaves_early_gets_no_traceback():
    with subprocess.Popen(
        [sys.executable, "-m", "edgeglm.cli.main", "targets", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        text = process.stderr.read()
    assert b"Traceback" not in text
    assert b"unexpected" not in text


_WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from edgeglm.cli import main as cli
import click

@click.command()
def waiting():
    print("waiting", flush=True)
    time.sleep(60)

cli.LazyGroup.get_command = lambda *_: waiting
sys.exit(cli.exit_code(["build"]))
"""


def test_ctrl_c_exits_with_130_and_says_how_to_resume():
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again to resume" in text
    assert "Traceback" not in text


def test_targets_as_json_is_json(capsys: pytest.CaptureFixture[str]):
    assert cli.exit_code(["targets", "--json"]) == 0
    names = {target["name"] for target in json.loads(capsys.readouterr().out)}
    assert {"jetson-agx", "t4", "cpu"} <= names
