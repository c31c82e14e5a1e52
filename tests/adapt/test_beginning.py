"""If this fails, a build in which nothing has changed takes as long as importing torch does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the host half is not installed")

from tests.synthetic import write_synthetic_pairs

ASKED = """
import sys
from pathlib import Path
from edgeglm.adapt.beginning import require_told
from edgeglm.core.recipe import TeacherConfig
from edgeglm.data.pairs import PairSet
import edgeglm.build.suited
require_told(TeacherConfig(), PairSet.open(Path(sys.argv[1])))
print("torch" in sys.modules)
"""


def test_pairs_of_a_recipe_that_asks_for_names_alone_are_found_to_suit_it_without_torch(
    tmp_path: Path,
) -> None:
    pairs = write_synthetic_pairs(tmp_path / "pairs", size=16)
    command = [sys.executable, "-c", ASKED, str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
