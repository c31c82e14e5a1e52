"""If these fail, LoRA without dropout learns something else than peft's, or cannot be taken apart again."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the host half is not installed")
peft = pytest.importorskip("peft", reason="the host half is not installed")

from edgeglm.adapt.merged_lora import merge_products  # noqa: E402

X = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))


def adapted(*, dropout: float = 0.0, **options: Any) -> Any:
    """Two linear layers with trained adapters, equal in each call."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.GELU(), torch.nn.Linear(8, 12, bias=False))
    options = {"target_modules": ["0", "2"], **options}
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, **options)
    made = peft.get_peft_model(plain, config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.train()


def trained(model: Any, x: Any) -> tuple[Any, dict[str, Any]]:
    said = model(x)
    said.square().mean().backward()
    return said, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_it_says_and_learns_what_the_layers_of_peft_do() -> None:
    theirs, ours = adapted(), adapted()
    assert merge_products(ours) == 2
    one, two = X.clone().requires_grad_(), X.clone().requires_grad_()
    (expected, wanted), (said, found) = trained(theirs, one), trained(ours, two)
    torch.testing.assert_close(said, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(two.grad, one.grad, atol=1e-6, rtol=1e-5)
    assert list(found) == list(wanted), "a checkpoint names the same parameters"
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_it_is_folded_into_the_weights_as_before() -> None:
    model = adapted()
    merge_products(model)
    with torch.no_grad():
        before = model(X)
        with model.disable_adapter():
            assert float((model(X) - before).abs().max()) > 1e-3, "the base alone says something else"
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(X), before, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in plain.named_modules())


def test_a_copy_has_weights_of_its_own() -> None:
    model = adapted()
    merge_products(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(X)
        for parameter in other.parameters():
            parameter.zero_()
        assert float(other(X).abs().max()) == 0.0
        torch.testing.assert_close(model(X), before)


def test_another_precision_goes_the_way_of_peft() -> None:
    model, theirs = adapted(), adapted()
    merge_products(model)
    with torch.autocast("cpu", torch.bfloat16):
        (said, found), (expected, wanted) = trained(model, X), trained(theirs, X)
    assert torch.equal(said, expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["0"]}]
)
def test_adapters_of_another_kind_stay_as_they_are(options: dict[str, Any]) -> None:
    assert merge_products(adapted(**options)) == 0
