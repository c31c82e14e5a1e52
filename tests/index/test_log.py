from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.core.errors import UserError
from edgeglm.index.log import AppendLog, record_bytes, records_from, replayed

RECORDS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40), st.binary(max_size=80)), max_size=5)


def read(path: Path, start: int = 0):
    file = os.open(path, os.O_RDONLY)
    try:
        return replayed(file, path, start)
    finally:
        os.close(file)


@given(records=RECORDS, cut=st.integers(0, 300))
def test_a_log_cut_anywhere_keeps_every_record_before_the_cut(records, cut):
    parts = [record_bytes(*record) for record in records]
    data = b"".join(parts)[:cut]
    whole, end = [], 0
    for record, part in zip(records, parts, strict=True):
        if end + len(part) > len(data):
            break
        whole.append(record)
        end += len(part)
    found = list(records_from(data))
    assert [(one.kind, one.head, one.blob) for one in found] == whole
    assert (found[-1].end if found else 0) == end


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_as_no_record_and_raise_nothing(data):
    list(records_from(b"EGLR" + data))


@given(records=RECORDS.filter(bool), place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_another_record(records, place, bit):
    data = bytearray(b"".join(record_bytes(*record) for record in records))
    data[place % len(data)] ^= 1 << bit
    for one in records_from(bytes(data)):
        assert (one.kind, one.head, one.blob) in records


def test_damage_in_the_middle_is_told_and_not_taken_for_an_unfinished_record(tmp_path: Path):
    path = tmp_path / "log"
    first, second = record_bytes(1, b"one", b"x" * 50), record_bytes(1, b"two")
    path.write_bytes(first[:40] + b"!" + first[41:] + second)
    with pytest.raises(UserError, match=r"damaged at byte 0.*build it again"):
        read(path)


def test_a_full_disk_leaves_nothing_of_a_record_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "log"
    path.write_bytes(b"")
    log = AppendLog(path, 0)
    log.append(1, b"first")
    real = os.pwrite

    def full(file: int, data: memoryview, at: int) -> int:
        if at > log.end:
            raise OSError(28, "No space left on device")
        return real(file, data[:10], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"No space left.*free some space"):
        log.append(1, b"second", b"x" * 100)
    monkeypatch.undo()
    log.append(1, b"third")
    log.close()
    records, _ = read(path)
    assert [one.head for one in records] == [b"first", b"third"]
