"""If these fail, a head divides by zero on a device, or forgets the data that it was fitted to."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.models.projection import NORM_EPS, ProjectionHead, ScaledHeads, normalized  # noqa: E402


def test_rows_have_length_one_and_a_row_of_zeros_is_no_nan() -> None:
    rows = normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_the_norm_survives_fp16() -> None:
    assert float(torch.tensor(NORM_EPS).half()) > 0.0, "a smallest number of zero would not help"
    assert torch.isfinite(normalized(torch.zeros(1, 4).half())).all()


def test_standardised_features_have_no_scale_of_their_own() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(6, 4, hidden=8, input_dropout=0.0, dropout=0.0).eval()
    sample = torch.randn(200, 6)
    head.standardise(sample)
    with torch.no_grad():
        before = head(sample)
        head.standardise(sample * 50 + 7)
        torch.testing.assert_close(head(sample * 50 + 7), before, atol=2e-2, rtol=0)
    assert set(head.state_dict()) >= {"mean", "std"}, "what was found is kept with the weights"


def test_a_feature_that_never_varies_and_one_far_off_stay_finite() -> None:
    head = ProjectionHead(3, 4, hidden=8, input_dropout=0.0, dropout=0.0).eval()
    head.standardise(torch.tensor([[1.0, 2.0, 3.0], [1.0, 3.0, 5.0]]))
    found = head(torch.tensor([[1e6, -1e6, 1e6]])).detach()
    assert torch.isfinite(found).all()
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)


def test_an_ensemble_is_the_scaled_sum_of_its_heads_and_learns_whom_to_trust() -> None:
    torch.manual_seed(0)
    goal = torch.nn.functional.normalize(torch.randn(300, 4))
    known, noise = torch.randn(300, 4) * 0.05 + goal, torch.randn(300, 6)
    features = torch.cat([noise, known], 1)
    heads = [
        ProjectionHead(width, 4, hidden=8, input_dropout=0.0, dropout=0.0) for width in (6, 4)
    ]  # fmt: skip
    ensemble = ScaledHeads(heads, (6, 4))
    ensemble.standardise(features)
    torch.testing.assert_close(heads[1].mean, known.mean(0))
    torch.testing.assert_close(ensemble.scales, torch.tensor([0.5, 0.5]))
    ensemble.eval()
    with torch.no_grad():
        alone = [head(part) for head, part in zip(heads, features.split([6, 4], 1), strict=True)]
        torch.testing.assert_close(ensemble(features), normalized(alone[0] + alone[1]), atol=1e-5, rtol=0)
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        torch.autograd.backward((1 - (ensemble(features) * goal).sum(1)).mean())
        optimizer.step()
    scales = ensemble.scales.detach()
    assert float(scales[1]) > 0.7 > 0.3 > float(scales[0]), "the member that knows nothing counts for less"
    assert float(scales.sum()) == pytest.approx(1.0)
    assert len(ensemble.last_layers()) == 4
