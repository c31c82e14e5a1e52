"""If these fail, a user's unlabelled images pull embeddings the wrong way, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")

from edgeglm.train.domain_losses import (  # noqa: E402
    DomainDiscriminator,
    adversarial_loss,
    covariance_distance,
    kernel_mean_distance,
    reversal_ramp,
    reversed_gradient,
)


def cloud(count: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Any:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * scale + shift


@pytest.mark.parametrize("distance", [kernel_mean_distance, covariance_distance])
def test_a_domain_is_no_distance_from_itself_and_far_from_another(distance) -> None:
    one = cloud(300, 0)
    assert float(distance(one, one)) == pytest.approx(0.0, abs=1e-6)
    again, other = cloud(300, 1), cloud(300, 1, shift=1.0, scale=2.0)
    assert float(distance(one, other)) > 5 * float(distance(one, again))
    assert float(distance(one, other)) == pytest.approx(float(distance(other, one)), rel=1e-4)


def test_means_apart_are_seen_by_kernels_and_not_by_covariances() -> None:
    one, moved = cloud(300, 0), cloud(300, 0) + 3.0
    assert float(kernel_mean_distance(one, moved)) > 0.3
    assert float(covariance_distance(one, moved)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("distance", [kernel_mean_distance, covariance_distance])
def test_following_the_gradient_brings_domains_together(distance) -> None:
    target = cloud(100, 1, shift=0.5, scale=1.5)
    source = cloud(100, 0).requires_grad_()
    before = float(distance(source.detach(), target))
    optimizer = torch.optim.Adam([source], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        torch.autograd.backward(distance(source, target))
        optimizer.step()
    assert float(distance(source.detach(), target)) < 0.5 * before


def test_the_reversal_changes_gradients_and_nothing_else() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    there = reversed_gradient(x, 0.5)
    assert torch.equal(there, x)
    torch.autograd.backward((there * torch.tensor([3.0, 4.0])).sum())
    assert x.grad is not None
    assert x.grad.tolist() == [-1.5, -2.0]


def test_the_reversal_starts_at_nothing_and_ends_whole() -> None:
    ramp = [reversal_ramp(step / 10) for step in range(11)]
    assert ramp[0] == 0.0
    assert ramp == sorted(ramp)
    assert 0.999 < ramp[-1] < 1.0


def test_the_discriminator_learns_while_what_it_reads_is_taught_to_deceive_it() -> None:
    torch.manual_seed(0)
    judge = DomainDiscriminator(8)
    shift = torch.zeros(8, requires_grad=True)
    source, target = cloud(200, 0), cloud(200, 1, shift=0.7)
    judge_only = torch.optim.Adam(judge.parameters(), lr=1e-2)
    for _ in range(60):
        judge_only.zero_grad()
        torch.autograd.backward(adversarial_loss(judge, source, target, strength=0.0))
        judge_only.step()
    sharp = float(adversarial_loss(judge, source, target, strength=1.0).detach())
    assert sharp < 0.3
    both = torch.optim.Adam([*judge.parameters(), shift], lr=1e-2)
    for _ in range(150):
        both.zero_grad()
        torch.autograd.backward(adversarial_loss(judge, source + shift, target, strength=1.0))
        both.step()
    assert float((shift.detach() - 0.7).abs().mean()) < 0.4, "the source moved towards the target"
