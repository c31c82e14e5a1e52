"""LoRA without dropout as one product a layer: x (W + s B A)^T, in place of x W^T + s (x A^T) B^T.

The sum is the same; what is saved is three passes over the activations forward and back, which on a CPU cost
more than adding a matrix of low rank to a frozen one. With dropout between x and A the two are not the same,
and peft's own layer is left as it is.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Merged(torch.autograd.Function):
    """x, W [O, I], bias [O] or None, A [R, I], B [O, R], s -> x (W + s B A)^T + bias, W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        """Make the merged matrix and keep it: [..., I] -> [..., O]."""
        merged_OI = torch.addmm(weight_OI, b_OR, a_RI, alpha=scale)
        ctx.save_for_backward(x, merged_OI, a_RI, b_OR)
        ctx.scale = scale
        return F.linear(x, merged_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B; that of the whole matrix, [O, I], is never made."""
        (gradient,) = gradients
        x, merged_OI, a_RI, b_OR = ctx.saved_tensors
        gradient_NO, x_NI = gradient.flatten(0, -2), x.flatten(0, -2)
        of_x = gradient @ merged_OI if ctx.needs_input_grad[0] else None
        of_a = ctx.scale * ((gradient_NO @ b_OR).T @ x_NI)
        of_b = ctx.scale * (gradient_NO.T @ (x_NI @ a_RI.T))
        return of_x, None, None, of_a, of_b, None


def merge_products(encoder: nn.Module) -> int:
    """Let every plain LoRA layer of peft without dropout say the same by one product; return how many do.

    A layer whose adapter is off or merged, or that is called under autocast or in another precision than
    float32, goes peft's way. Parameters, their names and the way back (``merge_and_unload``) stay peft's.
    """
    from peft.tuners.lora import Linear

    found = [module for module in encoder.modules() if type(module) is Linear and _is_plain(module)]
    for module in found:
        module.__class__ = _merging(Linear)
    return len(found)


def _is_plain(module: Any) -> bool:
    """Say whether a layer has one adapter, of low rank and nothing else."""
    names = list(module.lora_A)
    return (
        len(names) == 1
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
        and names[0] not in module.lora_variant
        and type(module.base_layer) is nn.Linear
        and module.lora_B[names[0]].bias is None
    )


@cache
def _merging(theirs: Any) -> type[Any]:
    """Return peft's layer with another product; a function, as peft is imported where it is needed."""

    class MergingLinear(theirs):  # type: ignore[misc] # peft's class is not known before
        """LoRA by one product."""

        def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
            """[..., I] -> [..., O]."""
            base, (name,) = self.base_layer, self.lora_A
            others = self.disable_adapters or self.merged or base.weight.requires_grad or arguments or named
            if others or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
                said: Tensor = super().forward(x, *arguments, **named)
                return said
            a_RI, b_OR = self.lora_A[name].weight, self.lora_B[name].weight
            merged: Tensor = _Merged.apply(  # type: ignore[no-untyped-call]
                x, base.weight, base.bias, a_RI, b_OR, self.scaling[name]
            )
            return merged

    return MergingLinear
