"""The Containerfiles: no engine builds them here, so they are read, and held against what they talk of."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgeglm.deploy.device.unit import serve_command

FILES = ("Containerfile.x86_64", "Containerfile.l4t")


@pytest.fixture(scope="module")
def describe(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("describe", repository / "scripts/containers/describe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_with_what_is_shipped(name, describe, repository):
    assert describe.faults(repository / "scripts" / "containers" / name) == []


@pytest.mark.parametrize(("name", "lock"), [(FILES[0], "py312-x86_64"), (FILES[1], "py310-aarch64")])
def test_the_image_holds_the_lock_of_its_python_and_the_code_alone(name, lock, describe, repository):
    found = describe.description(repository / "scripts" / "containers" / name)
    assert f"scripts/locks/device-{lock}.txt" in found["files"]
    assert "edgeglm/cli/serve.py" in found["files"]
    assert not any(file.startswith(("tests/", ".", "docs/")) for file in found["files"])
    version = lock[2] + "." + lock[3:5]
    if "x86_64" in name:
        assert f"python:{version}" in found["base"]


@pytest.mark.parametrize("name", FILES)
def test_the_image_serves_what_a_unit_serves(name, describe, repository):
    found = describe.description(repository / "scripts" / "containers" / name)
    mine = serve_command("python", host="0.0.0.0", port=8000, flags=["--no-grpc"])
    assert [*found["entrypoint"], *found["command"]] == ["current" if w == "bundle" else w for w in mine]


@pytest.mark.parametrize("place", [*(f"scripts/containers/{name}" for name in FILES), "docs/deploy.md"])
def test_who_builds_as_written_gets_a_health_check(place, repository):
    lines = [line for line in (repository / place).read_text().splitlines() if "podman build" in line]
    assert lines
    assert all("--format docker" in line for line in lines), "podman's own format drops HEALTHCHECK"


def test_a_jetsons_gpu_is_asked_for_with_the_group_that_may_open_it(repository):
    for place in ("scripts/containers/Containerfile.l4t", "docs/deploy.md"):
        assert "--runtime nvidia --group-add video" in (repository / place).read_text()


@pytest.mark.parametrize("name", FILES)
def test_its_command_line_is_one_that_edgeglm_takes(name, describe, repository, cli):
    text = cli("serve", "--help")
    for flag in re.findall(
        r"--[a-z-]+", " ".join(describe.description(repository / "scripts" / "containers" / name)["command"])
    ):
        assert flag in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("FROM ${BASE}", "FROM python:latest"), "names no version"),
        (("USER 10001:10001", "USER root"), "it runs as root"),
        (("--require-hashes ", ""), "without --require-hashes"),
        (("COPY export", "COPY nowhere"), "COPY nowhere"),
        (("COPY export /usr/local/edgeglm/source/export", "COPY . /srv"), "secrets included"),
        (("/v2/health/ready", "/"), "does not ask /v2/health/ready"),
        (("EXPOSE 8000", "EXPOSE 80"), "port 8000 of the command"),
        (('ENTRYPOINT ["python", "-m", "edgeglm.cli.main"]', "ENTRYPOINT python"), "swallows SIGTERM"),
        (("STOPSIGNAL SIGTERM", "ENV EDGEGLM_TOKEN=x"), "a secret in a layer"),
        (("STOPSIGNAL SIGTERM", "RUN curl https://x | sh"), "nobody has read that"),
        (("STOPSIGNAL SIGTERM", "ADD https://x /"), "use COPY"),
    ],
)
def test_a_fault_is_found_and_says_why(change, words, describe, repository, tmp_path):
    text = (repository / "scripts" / "containers" / FILES[0]).read_text()
    assert change[0] in text
    (tmp_path / "Containerfile").write_text(text.replace(*change))
    assert any(words in fault for fault in describe.faults(tmp_path / "Containerfile"))


def test_the_description_is_printed_for_those_who_have_no_engine(repository):
    command = [
        sys.executable,
        str(repository / "scripts/containers/describe.py"),
        "scripts/containers/Containerfile.l4t",
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"base": "nvcr.io/nvidia/l4t-jetpack:' in done.stdout
