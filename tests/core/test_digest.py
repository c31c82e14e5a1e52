from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeglm.core.artifact import listing_of
from edgeglm.core.digest import sha256_bytes, sha256_file, sha256_json, sha256_listing

_json = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_has_the_digest_that_sha256sum_prints(tmp_path: Path, size: int):
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "data"
    path.write_bytes(data[:size])
    assert sha256_file(path) == hashlib.sha256(data[:size]).hexdigest() == sha256_bytes(data[:size])


@given(st.dictionaries(st.text(max_size=8), _json, min_size=2, max_size=4))
def test_the_order_of_keys_never_makes_a_stage_run_again(tree):
    assert sha256_json(tree) == sha256_json(dict(reversed(tree.items())))


@given(st.dictionaries(st.text(min_size=1), st.text(), min_size=1), st.text())
def test_any_changed_content_or_name_changes_the_digest_of_a_set_of_files(files, other):
    name = next(iter(files))
    if files[name] != other:
        assert sha256_listing({**files, name: other}) != sha256_listing(files)
    renamed = {f"{key}x": value for key, value in files.items()}
    assert sha256_listing(renamed) != sha256_listing(files)


def test_nan_is_refused_because_it_has_no_json_form():
    with pytest.raises(ValueError, match="not JSON compliant"):
        sha256_json({"loss": math.nan})


def test_a_link_out_of_an_artifact_is_refused(tmp_path: Path):
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="symbolic link"):
        listing_of(tmp_path)


def test_a_linked_folder_in_an_artifact_is_refused(tmp_path: Path):
    (tmp_path / "link").symlink_to("/etc", target_is_directory=True)
    with pytest.raises(ValueError, match="symbolic link"):
        listing_of(tmp_path)
