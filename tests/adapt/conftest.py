"""What tests of adapting read and none of them changes: the files of a tiny BERT, and drawn pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edgeglm.data.pairs import PairSet


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_towers import write_bert

    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    from edgeglm.data.pairs import PairSet
    from tests.synthetic import write_synthetic_pairs

    return PairSet.open(write_synthetic_pairs(tmp_path_factory.mktemp("pairs"), size=16))
