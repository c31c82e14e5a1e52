from __future__ import annotations

import pytest

from edgeglm.core.errors import EdgeglmError, GateError, UserError, unknown_name


def test_a_typo_names_the_nearest_known_name_and_all_others():
    error = unknown_name("target", "jetson-agz", ["jetson-agx", "a10"])
    assert str(error) == "unknown target 'jetson-agz'; known: a10, jetson-agx; did you mean 'jetson-agx'?"


def test_a_name_near_to_nothing_still_ends_in_a_remedy():
    assert str(unknown_name("target", "JETSON-AGX", ["jetson-agx", "a10"])).endswith(
        "did you mean 'jetson-agx'?"
    )
    assert str(unknown_name("track", "xyz", ["alpha"], "see docs")).endswith("; see docs")
    assert str(unknown_name("track", "xyz", [])) == "unknown track 'xyz'; known: none; use one of those"


@pytest.mark.parametrize(("kind", "code"), [(EdgeglmError, 1), (UserError, 2), (GateError, 3)])
def test_scripts_can_tell_bad_input_from_a_missed_gate_by_the_exit_code(kind, code):
    assert kind.exit_code == code
    assert issubclass(kind, EdgeglmError)
