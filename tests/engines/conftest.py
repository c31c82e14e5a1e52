"""Fixtures of the stand-in for the CUDA driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeglm.engines import cuda_ctypes
from tests.engines.stand_in_cuda import StandIn, compiled_libcuda


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory, require_system: Callable[[str], str]) -> Path:
    """The stand-in's library."""
    return compiled_libcuda(tmp_path_factory.mktemp("libcuda"), require_system("cc"))


@pytest.fixture
def stand_in(libcuda: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A fresh stand-in in the place of ``libcuda``, by ctypes; all must be given back at the end."""
    made = StandIn(libcuda)
    made.library.fake_reset()
    monkeypatch.setenv("EDGEGLM_CUDA", "ctypes")
    monkeypatch.setattr(cuda_ctypes, "LIBRARY", str(libcuda))
    yield made
    assert made.given_back
    assert made.retained == 0
