"""If these fail, a student is told about another picture than its teacher saw."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.data.pairs import PairSet  # noqa: E402
from edgeglm.data.transforms import ImagePreprocessing, model_input_from_files  # noqa: E402
from edgeglm.train.views import Views, distorted, view_parameters  # noqa: E402
from tests.synthetic import write_synthetic_pairs  # noqa: E402


def blob(side: int) -> Any:
    """A soft coloured spot off the middle: the same picture at every resolution."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    spot = torch.exp(-(((x - 0.2) ** 2 + (y + 0.1) ** 2) / 0.1))
    return torch.stack([1 - 0.8 * spot, 1 - 0.4 * spot, 1 - 0.1 * spot])[None]


def test_a_view_is_the_same_picture_at_two_resolutions() -> None:
    parameters = view_parameters(4, seed=3, view=1)
    large = distorted(blob(128).expand(4, -1, -1, -1), parameters)
    small = distorted(blob(64).expand(4, -1, -1, -1), parameters)
    halved = torch.nn.functional.avg_pool2d(large, 2)
    torch.testing.assert_close(small, halved, atol=0.02, rtol=0)
    assert (large - blob(128)).abs().amax(dim=(1, 2, 3)).min() > 0.05, "each view differs from the plain one"


def test_a_view_can_be_made_again_image_by_image() -> None:
    drawn = view_parameters(6, seed=3, view=2)
    whole = distorted(blob(32).expand(6, -1, -1, -1), drawn)
    chosen = torch.tensor([4, 1])
    again = view_parameters(6, seed=3, view=2).of(chosen)
    torch.testing.assert_close(distorted(blob(32).expand(2, -1, -1, -1), again), whole[chosen])


def test_views_and_seeds_differ() -> None:
    base = view_parameters(3, seed=3, view=1).affine
    assert not torch.equal(base, view_parameters(3, seed=3, view=2).affine)
    assert not torch.equal(base, view_parameters(3, seed=4, view=1).affine)


def test_a_grey_picture_stays_grey() -> None:
    grey = torch.linspace(0, 1, 32).expand(8, 3, 32, 32)
    found = distorted(grey, view_parameters(8, seed=1, view=1))
    torch.testing.assert_close(found[:, 0], found[:, 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[:, 0], found[:, 2], atol=1e-4, rtol=0)


def test_what_comes_from_outside_is_white_and_nothing_leaves_the_range() -> None:
    parameters = view_parameters(16, seed=2, view=1)
    white = distorted(torch.ones(16, 3, 24, 24), parameters)
    torch.testing.assert_close(white, torch.ones_like(white), atol=1e-5, rtol=0)
    noise = torch.rand(16, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = distorted(noise, parameters)
    assert float(found.min()) >= 0.0
    assert float(found.max()) <= 1.0


def test_the_first_view_is_what_a_device_shows_and_the_others_know_no_margin(tmp_path: Path) -> None:
    pairs = PairSet.open(write_synthetic_pairs(tmp_path / "pairs", size=48))
    wide = dataclasses.replace(pairs, summary={**pairs.summary, "margin": 0.1})
    chosen = torch.tensor([5, 0, 3])
    drawn, bare = (Views(one, 3, seed=1, resolution=32) for one in (wide, pairs))
    views = list(drawn.every(chosen))
    assert len(views) == len(drawn) == 3
    files = []
    for place in chosen.tolist():
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pairs.images[place])).save(buffer, "PNG")
        files.append(buffer.getvalue())
    shown = model_input_from_files(files, ImagePreprocessing(resolution=32, margin=0.1))
    np.testing.assert_array_equal(views[0].numpy(), shown)
    assert not torch.equal(views[0], bare.one(0, chosen)), "the margin was to be seen"
    for view in (1, 2):
        torch.testing.assert_close(views[view], bare.one(view, chosen), atol=0, rtol=0)
        torch.testing.assert_close(views[view], drawn.one(view, chosen), atol=0, rtol=0)
