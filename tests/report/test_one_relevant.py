"""Every page that quotes mAP@10 says when it is nothing else than MRR@10."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeglm.evaluate.retrieval import ONE_RELEVANT_NOTE


@pytest.mark.parametrize("place", ["docs/bench/*.md", "scripts/bench/*.py"])
def test_a_page_or_its_writer_that_quotes_map10_says_so(repository: Path, place: str) -> None:
    quoting = {
        path.name: path.read_text("utf-8")
        for path in repository.glob(place)
        if "mAP@10" in path.read_text("utf-8")
    }
    assert len(quoting) > 5
    page_of = {"adapt_tuning.py": "adapt_tuning_page.py", "quantization.py": "quantization_page.py"}
    page_of["quantization_models.py"] = "quantization_page.py"
    silent = [
        name
        for name, text in quoting.items()
        if not any(words in text for words in (ONE_RELEVANT_NOTE, "ONE_RELEVANT_NOTE", "equals MRR@10"))
        and page_of.get(name) not in quoting
    ]
    assert silent == []


def test_both_readmes_say_so(repository: Path) -> None:
    assert "mAP@10 equals MRR@10" in (repository / "README.md").read_text("utf-8")
    assert "mAP@10 等于 MRR@10" in (repository / "README.zh-CN.md").read_text("utf-8")
