"""Warnings are held back while somebody asks for it, and come again afterwards, whoever else was at work."""

from __future__ import annotations

import os
import warnings

import pytest

from edgeglm.core.quiet import quiet


def is_told() -> bool:
    """Say whether a warning is raised, as the filters of the tests ask for."""
    try:
        warnings.warn("half of it is lost", UserWarning, stacklevel=1)
    except UserWarning:
        return True
    return False


def test_warnings_come_again_when_the_last_one_has_left():
    with quiet:
        with quiet:
            assert not is_told()
        assert not is_told()
    assert is_told()


def test_one_who_keeps_the_filters_meanwhile_does_not_put_back_the_silence():
    former = list(warnings.filters)
    others = warnings.catch_warnings()
    with quiet:
        others.__enter__()  # as another thread may, at any time
    assert is_told()
    others.__exit__(None, None, None)
    assert is_told()
    assert warnings.filters == former


def test_one_who_began_before_does_not_lose_its_filters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet.__enter__()
    quiet.__exit__()
    assert is_told()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_was_forked_meanwhile_warns():
    with quiet:
        if (child := os.fork()) == 0:
            os._exit(0 if is_told() else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
