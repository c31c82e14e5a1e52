"""If these fail, a tower is trained for another rounding than its INT8 file has, or comes out altered."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from torch import nn  # noqa: E402

from edgeglm.train.fake_quantization import Rounding, fake_quantized  # noqa: E402


@pytest.fixture
def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5, bias=False)
    ).eval()


def last(tower: nn.Sequential) -> nn.Linear:
    found = tower[3]
    assert isinstance(found, nn.Linear)
    return found


PIXELS = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_products_are_rounded_within_and_as_they_were_afterwards(tower: nn.Sequential) -> None:
    before, keys = tower(PIXELS), list(tower.state_dict())
    with fake_quantized(tower, lambda: tower(PIXELS)) as names:
        assert names == ["0", "3"]
        rounded = tower(PIXELS)
    assert not torch.equal(rounded, before)
    torch.testing.assert_close(rounded, before, atol=0.02, rtol=0.0)
    assert torch.equal(tower(PIXELS), before)
    assert sorted(tower.state_dict()) == sorted(keys)


def test_it_rounds_as_the_file_will_by_hand(tower: nn.Sequential) -> None:
    linear = nn.Linear(3, 2, bias=False).eval()
    x = torch.tensor([[1.0, -0.6, 0.31]])

    def rounded(value, scale):
        return torch.round(value / scale).clamp(-127, 127) * scale

    expected = (
        rounded(x, x.abs().max() / 127)
        @ torch.stack([rounded(row, row.abs().max() / 127) for row in linear.weight]).T
    )
    with fake_quantized(linear, lambda: linear(x)):
        torch.testing.assert_close(linear(x), expected, atol=1e-6, rtol=1e-5)


def test_fewer_bits_and_one_scale_for_all_lose_more(tower: nn.Sequential) -> None:
    with torch.no_grad():
        last(tower).weight[0] *= 50  # one wide channel, which takes the others' scale
    before, lost = tower(PIXELS), []
    for rounding in (Rounding(), Rounding(per_channel=False), Rounding(weight_bits=4, per_channel=False)):
        with fake_quantized(tower, lambda: tower(PIXELS), rounding):
            lost.append(float((tower(PIXELS) - before)[:, 1:].detach().abs().mean()))
    assert lost == sorted(lost)
    assert lost[2] > 3 * lost[0]


def test_training_reaches_the_weights_through_the_rounding(tower: nn.Sequential) -> None:
    goal = torch.ones(8, 5)
    weights = last(tower).weight
    kept = weights.detach().clone()
    with fake_quantized(tower, lambda: tower(PIXELS), Rounding(weight_bits=4)):
        optimizer = torch.optim.SGD(tower.parameters(), lr=0.05)
        losses = []
        for _ in range(30):
            loss = (tower(PIXELS) - goal).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert last(tower).weight is weights
    assert not torch.equal(last(tower).weight, kept)


def test_an_error_within_leaves_no_quantizer_behind(tower: nn.Sequential) -> None:
    before = tower(PIXELS)
    with pytest.raises(ZeroDivisionError), fake_quantized(tower, lambda: tower(PIXELS)):
        _ = 1 / 0
    assert torch.equal(tower(PIXELS), before)
