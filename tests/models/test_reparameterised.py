"""If these fail, a student that learnt with branches is another one once they are merged."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.models.efficientnet_lite import LiteTrunk  # noqa: E402
from edgeglm.models.reparameterised import BranchedDepthwise, branch, merge  # noqa: E402


@pytest.fixture
def trunk() -> LiteTrunk:
    torch.manual_seed(0)
    return LiteTrunk(7, (6,)).eval()


@pytest.mark.parametrize("side", [50, 63, 64])
def test_a_network_begins_with_branches_as_it_was_without(trunk: LiteTrunk, side: int) -> None:
    pixels = torch.rand(2, 3, side, side)
    with torch.no_grad():
        before = trunk(pixels)[0]
        branch(trunk, 2)
        assert torch.equal(trunk(pixels)[0], before)
    branched = [isinstance(block._depthwise_conv, BranchedDepthwise) for block in trunk.blocks]
    assert branched == [False, False, True, True, True, True, True]


@pytest.mark.parametrize("side", [50, 63, 64])
def test_merging_keeps_what_the_branches_learnt_and_leaves_the_plain_network(
    trunk: LiteTrunk, side: int
) -> None:
    plain = {name: value.shape for name, value in trunk.state_dict().items()}
    pixels = torch.rand(2, 3, side, side)
    branch(trunk)
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -1.0, 1.0)
    trunk.train()
    for _ in range(10):
        trunk(torch.rand(4, 3, side, side))
    trunk.eval()
    with torch.no_grad():
        before = trunk(pixels)[0]
        merge(trunk)
        after = trunk(pixels)[0]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert {name: value.shape for name, value in trunk.state_dict().items()} == plain


def test_the_branches_learn(trunk: LiteTrunk) -> None:
    branch(trunk)
    trunk(torch.rand(2, 3, 32, 32))[0].square().sum().backward()
    branched = [module for module in trunk.modules() if isinstance(module, BranchedDepthwise)]
    assert len(branched) == 7
    for module in branched:
        gradient = module.point_norm.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
