"""The bench under a whole systemd: its page holds no figure that its document does not."""

from __future__ import annotations

import importlib
import json

import pytest


def test_the_page_is_what_its_document_makes(repository, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts/bench"))
    page = importlib.import_module("deploy_systemd_page").page
    place = repository / "docs/bench/deploy_systemd.json"
    assert page(json.loads(place.read_text())) == place.with_suffix(".md").read_text()
