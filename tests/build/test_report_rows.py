"""If this fails, a report says of a teacher that it was tuned in another way than it was."""

from __future__ import annotations

import pytest

from edgeglm.build.report_rows import _tuned
from edgeglm.core.recipe import recipe_from_toml


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), " + LoRA 8"),
        (("lora_rank=4", "tuned_blocks=2"), " + LoRA 4, last 2 blocks"),
        (("tuning=dora",), " + DoRA 8"),
        (("tuning=ia3",), " + IA3"),
        (("tuning=p-tuning", "virtual_tokens=6"), " + P-tuning of 6"),
        (("tuning=full",), ", all blocks tuned"),
        (("tuning=partial", "tuned_blocks=2"), ", last 2 blocks tuned"),
        (("lora_epochs=0",), ""),
    ],
)
def test_a_text_tower_is_said_to_be_tuned_as_it_was(overrides: tuple[str, ...], said: str) -> None:
    recipe = recipe_from_toml("", origin="here", overrides=[f"teacher.{one}" for one in overrides])
    assert _tuned(recipe.teacher) == said
