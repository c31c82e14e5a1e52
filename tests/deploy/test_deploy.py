"""Deploying over a real OpenSSH server: what travels, what serves, and what goes back by itself."""

from __future__ import annotations

import json

import pytest


def content(path) -> str:
    return json.loads((path / "manifest.json").read_bytes())["content_digest"]


def test_a_bundle_is_finalized_and_served(device, bundle, deploy, inventory):
    pear = device("pear")
    path = bundle()
    states = []
    summary = deploy(path, "pear", on_change=lambda name, state, note: states.append((state, note)))
    assert summary.exit_code == 0, summary.devices
    (one,) = summary.devices
    assert pear.answers() == content(path)
    assert pear.record()["state"] == "ready"
    assert ("finalize", "finalize: fp32") in states, "the device's progress is streamed back"
    (seen,) = inventory.devices()
    assert (seen.name, seen.serving, seen.ready) == ("pear", "a", True)
    assert seen.url == one.delivered.url
