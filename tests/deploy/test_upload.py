"""What travels, also where one of both ends is not as it was when that was found out."""

from __future__ import annotations

import json
import os
import re

from tests.deploy.helpers import content


def test_what_a_power_cut_damaged_of_a_file_that_had_half_come_travels_anew(device, bundle, deploy):
    pear = device("pear")
    deploy(bundle("good"))
    fresh = bundle("fresh", payload=os.urandom(3_000_000))
    digest = json.loads((fresh / "manifest.json").read_bytes())["files"]["costs/payload.bin"]["sha256"]
    (pear.root / "incoming" / digest).write_bytes(bytes(1_000_000))
    (one,) = deploy(fresh).devices
    assert one.outcome == "done", one.reason
    assert one.delivered.sent_bytes > 3_000_000
    assert pear.answers() == content(fresh)


def test_a_bundle_that_is_made_anew_while_it_travels_is_told_so(device, bundle, deploy):
    pear = device("pear")
    good = bundle("good")
    deploy(good)
    parts = {f"reranker/{number}.bin": os.urandom(9) for number in range(9)}
    fresh = bundle("fresh", payload=os.urandom(3_000_000), **parts)
    made: list[object] = []

    def make_anew(name: str, state: str, note: str) -> None:
        if state == "upload" and " of " in note and not made:
            made.append(bundle("fresh", payload=b"other"))

    (one,) = deploy(fresh, on_change=make_anew).devices
    assert made
    assert re.search("while it travelled; deploy again|altered on the way or at home", one.reason), one.reason
    assert one.exit_code == 2
    assert pear.answers() == content(good)
    assert deploy(fresh).exit_code == 0


def test_all_bytes_are_told_as_gone_however_small_they_travelled(device, bundle, deploy):
    device("pear")
    notes: list[str] = []
    path = bundle("one", payload=bytes(900_000), **{"costs/more.bin": os.urandom(2_000_000)})
    assert deploy(path, on_change=lambda _, __, note: notes.append(note)).exit_code == 0
    said = [found.groups() for note in notes if (found := re.fullmatch(r"(\S+) of (\S+) MB", note))]
    assert said[-1][0] == said[-1][1] == "2.9"
