"""The entry point: a group that imports a command only when it is used, and the exit codes.

0 success · 1 unexpected failure · 2 bad input · 3 a gate was not met · 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from edgeglm import __version__
from edgeglm.cli.console import App
from edgeglm.core.errors import INTERRUPTED, EdgeglmError, UserError, unknown_name

# name: what the listing says. Kept here so that `edgeglm --help` imports no command. The code of
# `edgeglm NAME` is the click command called `command` in edgeglm/cli/NAME.py, with `_` for `-`.
COMMANDS = {
    "build": "Make a bundle from a recipe for a target.",
    "adapt": "Adapt a pretrained teacher to a domain, without a student.",
    "explain": "Say what a build would reuse, and why the rest must run.",
    "finalize": "Make a bundle ready on the machine that runs it.",
    "run": "Search a bundle's gallery with words or with a picture.",
    "index": "Keep an index of pictures, and search it.",
    "serve": "Serve a bundle over HTTP and gRPC.",
    "deploy": "Bring a bundle onto devices over SSH, and serve it there.",
    "rollback": "Serve again what a device served before.",
    "devices": "List the devices that were deployed to from here.",
    "logs": "Print what the server of a device wrote.",
    "remove": "Take a bundle, or everything, off a device.",
    "bench": "Measure a bundle's speed on this machine, under MLPerf's loads.",
    "inspect": "Show what a bundle holds.",
    "verify": "Hold every byte of a bundle against its digests.",
    "sign": "Vouch for a bundle with a key.",
    "keygen": "Make a key pair to sign bundles with.",
    "evaluate": "Judge a bundle on your own pairs, by any metrics, by category.",
    "report": "Copy or locate a bundle's HTML report.",
    "export": "Turn a model's towers into ONNX files.",
    "calibrate": "Draw the samples that INT8 ranges are found on, with proofs.",
    "quantize": "Find and apply the fastest INT8 plan of any ONNX file above a gate.",
    "lint": "Find what of an ONNX file overflows in FP16.",
    "fusions": "List what runtimes fuse of an ONNX file, and what prevents the rest.",
    "lower": "Write an ONNX file for the operators of an older TensorRT.",
    "export-repository": "Write a Triton model repository from a bundle.",
    "plan": "Say what a target takes, before anything is built.",
    "targets": "List the known targets, or show one.",
    "cache": "List the store of finished work, or make room in it.",
    "doctor": "Check this machine for what a build or a run needs.",
}

_TRACEBACK_VARIABLE = "EDGEGLM_TRACEBACK"
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_DEVICE_PARTS = ("onnxruntime", "tokenizers", "PIL")
_SERVE_PARTS = (
    "uvicorn", "starlette", "httptools", "uvloop", "grpc", "google", "prometheus_client", "python_multipart",
)  # fmt: skip


_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())  # of click 8.2; 8.1 prints the help itself


class LazyGroup(click.Group):
    """A click group whose commands are modules, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a day's work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"edgeglm.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command), cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or raise UserError with the nearest name."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise unknown_name("command", args[0], COMMANDS, "see edgeglm --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the listing from the table, importing nothing."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Full text of an unexpected failure: EDGEGLM_TRACEBACK=1. Place of the store: EDGEGLM_STORE.",
)
@click.version_option(__version__, prog_name="edgeglm", message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Take a pretrained image-text teacher to a verified bundle on an edge device."""
    ctx.obj = App()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        # A caption that an old locale has no letters for is shown with question marks, and ends no search.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    sys.exit(exit_code(sys.argv[1:] if arguments is None else arguments))


def exit_code(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors go to stderr as one message."""
    try:
        result = group.main(list(arguments), prog_name="edgeglm", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted; run the same command again to resume", INTERRUPTED, label=False)
    except click.UsageError as error:
        if isinstance(error, _HELP):
            return _say(error.format_message(), error.exit_code, label=False)
        command = error.ctx.command_path if error.ctx is not None else "edgeglm"
        return _say(f"{error.format_message().rstrip('.')}; see {command} --help", error.exit_code)
    except click.ClickException as error:
        return _say(error.format_message(), error.exit_code)
    except EdgeglmError as error:
        return _say(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "edgeglm").partition(".")[0] == "edgeglm":
            return _unexpected(error)
        return _say(_missing_part(error), UserError.exit_code)
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            return _unexpected(error)
        place = error.filename or "the output"
        text = f"cannot use {place}: {error.strerror}; free some space or choose a folder that can be written"
        return _say(text, UserError.exit_code)
    except Exception as error:
        return _unexpected(error)
    return result if isinstance(result, int) else 0


def _missing_part(error: ModuleNotFoundError) -> str:
    part = (error.name or "").partition(".")[0]
    extra = "device" if part in _DEVICE_PARTS else "serve" if part in _SERVE_PARTS else "build"
    extra = "traces" if part == "opentelemetry" else extra
    extra = "index" if part == "faiss" else extra
    if extra == "build" and sys.version_info < (3, 11):
        return f"this command needs {part}, of the host half; run it on a machine with Python 3.11 or newer"
    return f"this command needs {part}, which is not installed; pip install 'edgeglm[{extra}]'"


def _unexpected(error: Exception) -> int:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _say(f"unexpected {reason}; set {_TRACEBACK_VARIABLE}=1 and run again to see where", 1)


def _say(text: str, code: int, *, label: bool = True) -> int:
    if os.environ.get(_TRACEBACK_VARIABLE) and sys.exc_info()[0] is not None:
        click.echo(traceback.format_exc(), err=True, nl=False)
    click.echo(f"error: {text}" if label else text, err=True)
    return code


if __name__ == "__main__":
    main()
