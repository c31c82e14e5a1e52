from __future__ import annotations

from edgeglm.bundle.inspect import inspect_rows
from edgeglm.bundle.verify import open_bundle


def test_inspect_shows_the_gate_and_figure_of_every_variant_and_what_was_left_out(packed):
    bundle = open_bundle(packed)
    sections, tables = inspect_rows(bundle)
    shown = {section.title: dict(section.rows) for section in sections}
    assert shown["bundle"]["content digest"] == bundle.manifest.content_digest
    assert shown["target"]["name"] == "cpu"
    assert shown["target"]["compute capabilities"] == "[7.2, 8.7]"
    variants, accuracy = tables[:2]
    assert variants.columns == ("variant", "lane", "gate", ">size", ">image b1 ms")
    assert [row[:3] for row in variants.rows] == [
        ("fp32", "B", "reference"),
        ("int8 (default)", "B", "passed"),
        ("fp16", "-", "left out: mAP@10 0.2 of 0.5"),
    ]
    assert variants.rows[0][4:] == ("1.50",)
    assert accuracy.columns == ("track", ">fp32", ">int8", ">fp16, left out")
    assert accuracy.rows == (("unseen", "0.5000", "0.5000", "0.2000"),)
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert {table.title for table in tables} == {"variants", "mAP@10", "towers", "stages", "licences"}
