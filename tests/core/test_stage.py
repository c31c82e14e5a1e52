from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeglm.core.artifact import Artifact
from edgeglm.core.errors import GateError, UserError
from edgeglm.core.progress import QuietProgress
from edgeglm.core.stage import Context, Inputs, Stage, changes, code_digest
from edgeglm.core.store import Store


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    width: int = 2


class Recording(Stage[Sizes]):
    name = "recording"
    code = ("edgeglm.core.digest",)
    libraries = ("click",)
    calls: list[str]

    def __init__(self, config: Sizes, *, fail_in: str = "") -> None:
        super().__init__(config)
        self.calls = []
        self.fail_in = fail_in

    def requires(self, inputs: Inputs) -> None:
        self._called("requires")

    def run(self, inputs: Inputs, out: Path, context: Context) -> dict[str, Any]:
        (out / "result").write_text("x" * self.config.width)
        self._called("run")
        return {"map10": 0.5}

    def ensures(self, inputs: Inputs, out: Path, measured: Mapping[str, Any]) -> None:
        assert (out / "result").exists()
        assert measured == {"map10": 0.5}
        self._called("ensures")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fail_in == "requires":
            raise UserError("too few pairs; add more")
        if name == self.fail_in == "ensures":
            raise GateError("below the gate; train longer")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(store=Store(tmp_path / "store"), progress=QuietProgress())


def artifact(text: str) -> Artifact:
    return Artifact(kind="pairs", path=Path("/nowhere"), files={"pairs.jsonl": text})


def test_a_stage_checks_runs_checks_and_then_keeps(context: Context):
    stage = Recording(Sizes())
    first = stage({}, context)
    assert stage.calls == ["requires", "run", "ensures"]
    assert not first.reused
    assert first.artifact.provenance["measured"] == {"map10": 0.5}
    assert first.artifact.provenance["key"] == stage.key_parts({})


def test_unchanged_work_is_not_done_twice(context: Context):
    Recording(Sizes())({}, context)
    again = Recording(Sizes())
    assert again({}, context).reused
    assert again.calls == ["requires"]


def test_bad_input_stops_a_stage_before_any_work(context: Context):
    stage = Recording(Sizes(), fail_in="requires")
    with pytest.raises(UserError):
        stage({}, context)
    assert stage.calls == ["requires"]


def test_nothing_below_a_gate_is_ever_stored(context: Context):
    with pytest.raises(GateError):
        Recording(Sizes(), fail_in="ensures")({}, context)
    assert context.store.entries() == []
    assert not Recording(Sizes())({}, context).reused


def test_a_changed_config_or_input_changes_the_key():
    base = Recording(Sizes()).key({"pairs": artifact("1")})
    assert Recording(Sizes(width=3)).key({"pairs": artifact("1")}) != base
    assert Recording(Sizes()).key({"pairs": artifact("2")}) != base
    assert Recording(Sizes()).key({"other": artifact("1")}) != base
    assert Recording(Sizes()).key({"pairs": artifact("1")}) == base


def test_the_place_and_history_of_an_input_do_not_change_the_key():
    moved = Artifact(kind="pairs", path=Path("/else"), files={"pairs.jsonl": "1"}, provenance={"seconds": 3})
    stage = Recording(Sizes())
    assert stage.key({"pairs": moved}) == stage.key({"pairs": artifact("1")})


def test_changed_stage_code_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "stagecode"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    class Here(Recording):
        code = ("stagecode",)

    before = Here(Sizes()).key({})
    (package / "part.py").write_text("x = 2\n")
    code_digest.cache_clear()
    after = Here(Sizes()).key({})
    sys.modules.pop("stagecode", None)
    code_digest.cache_clear()
    assert before != after


def test_a_stage_that_names_code_which_does_not_exist_cannot_get_a_key():
    class Lost(Recording):
        code = ("edgeglm.core.no_such_module",)

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        Lost(Sizes()).key({})


def test_explain_names_the_one_input_that_changed():
    before = Recording(Sizes()).key_parts({"pairs": artifact("1")})
    after = Recording(Sizes(width=3)).key_parts({"pairs": artifact("1")})
    assert list(changes(before, after)) == ["config.width: 2 -> 3"]
    renewed = Recording(Sizes()).key_parts({"pairs": artifact("2")})
    assert [line.partition(":")[0] for line in changes(before, renewed)] == ["inputs.pairs"]
    assert list(changes(before, before)) == []
