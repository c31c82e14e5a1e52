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
from edgeglm.core.recipe import DomainConfig, TeacherConfig
from edgeglm.data.pairs import PairSet
import edgeglm.build.suited
domain = DomainConfig(pseudo_label_rounds=int(sys.argv[2]))
require_told(TeacherConfig(domain=domain), PairSet.open(Path(sys.argv[1])))
print("torch" in sys.modules)
"""


@pytest.mark.parametrize("rounds", [0, 2])
def test_pairs_are_found_to_suit_a_recipe_of_one_task_without_torch(tmp_path: Path, rounds: int) -> None:
    pairs = write_synthetic_pairs(tmp_path / "pairs", size=16)
    command = [sys.executable, "-c", ASKED, str(pairs), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
