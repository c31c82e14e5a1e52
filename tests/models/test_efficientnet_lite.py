"""If these fail, the published weights give other activations than they were trained for."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.models.efficientnet_lite import (  # noqa: E402
    LITE0_BLOCKS,
    Lite0Classifier,
    LiteTrunk,
    SameConv2d,
    lite0_trunk,
)
from tests.tiny_lite0 import classifier, published  # noqa: E402


@pytest.fixture(scope="module")
def trunk() -> LiteTrunk:
    torch.manual_seed(0)
    return LiteTrunk(6, (2, 5)).eval()


@pytest.mark.parametrize("side", [7, 8, 15, 16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_padding_is_that_of_tensorflow(side: int, kernel: int, stride: int) -> None:
    conv = SameConv2d(1, 1, kernel, stride=stride)
    torch.nn.init.ones_(conv.weight)
    picture = torch.rand(1, 1, side, side)
    out = -(-side // stride)
    total = max((out - 1) * stride + kernel - side, 0)
    before = total // 2  # the odd pixel goes to the end
    wide = torch.zeros(side + total, side + total)
    wide[before : before + side, before : before + side] = picture[0, 0]
    expected = wide.unfold(0, kernel, stride).unfold(1, kernel, stride).sum((2, 3))
    torch.testing.assert_close(conv(picture)[0, 0], expected)
    assert conv(picture).shape == (1, 1, out, out)


def test_the_published_weights_give_the_same_activations(trunk: LiteTrunk) -> None:
    loaded = lite0_trunk(published(trunk), blocks=6, taps=(2, 5)).eval()
    pixels = torch.rand(2, 3, 33, 33)
    with torch.no_grad():
        for found, expected in zip(loaded(pixels), trunk(pixels), strict=True):
            torch.testing.assert_close(found, expected)
    assert all(value.is_contiguous() for value in loaded.state_dict().values())


def test_weights_of_another_network_are_refused(trunk: LiteTrunk) -> None:
    with pytest.raises(ValueError, match=r"not of EfficientNet-Lite0: .* is missing"):
        lite0_trunk({"conv1.weight": torch.zeros(3)}, blocks=6, taps=(5,))
    fewer = published(trunk)
    with pytest.raises(ValueError, match="is missing"):
        lite0_trunk(fewer, blocks=7, taps=(6,))


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_cached_front_and_the_rest_are_the_whole(start: int, trunk: LiteTrunk) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        whole = trunk(pixels)
        cached = trunk.rest(trunk.front(pixels, start), start)
    for found, expected in zip(cached, whole[-len(cached) :], strict=True):
        torch.testing.assert_close(found, expected)
    assert len(trunk.part(start)) == 1 + start


@pytest.mark.parametrize(("blocks", "taps"), [(0, ()), (17, (0,)), (3, (3,)), (3, (-1,))])
def test_blocks_that_are_not_there_are_refused(blocks: int, taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no taps"):
        LiteTrunk(blocks, taps)


def test_the_blocks_fit_together() -> None:
    assert len(LITE0_BLOCKS) == 16
    for one, next_one in itertools.pairwise(LITE0_BLOCKS):
        assert one.outputs == next_one.inputs


def test_the_classifier_is_all_of_the_published_network() -> None:
    torch.manual_seed(0)
    whole = LiteTrunk(16, (15,)).eval()
    state = published(whole) | classifier(classes=9)
    pixels = torch.rand(2, 3, 33, 33)
    with torch.no_grad():
        x = torch.nn.functional.conv2d(whole(pixels)[0], state["_conv_head.weight"])
        scale = (state["_bn1.weight"] / (state["_bn1.running_var"] + 1e-3).sqrt())[:, None, None]
        x = (
            (x - state["_bn1.running_mean"][:, None, None]) * scale + state["_bn1.bias"][:, None, None]
        ).clamp(0, 6)
        expected = x.mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]
        torch.testing.assert_close(Lite0Classifier(state).eval()(pixels), expected, atol=1e-4, rtol=1e-4)


def test_weights_without_their_classifier_are_refused() -> None:
    state = published(LiteTrunk(16, (15,)))
    with pytest.raises(ValueError, match=r"_bn1\.bias is missing"):
        Lite0Classifier(state)
