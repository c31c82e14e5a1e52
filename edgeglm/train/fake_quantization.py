"""Quantization in training: products see rounded weights and inputs, gradients pass as if nothing was.

What is rounded, and how, is what the INT8 files do: the input of every convolution and linear layer
by one symmetric scale, its weights by one for each output channel (Jacob et al., 2018; the gradient is the
straight-through estimator of Bengio et al., 2013). The fake quantizers are torch's own (torch.ao); those of
ModelOpt need a solver, PuLP, that nothing else here uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How products are rounded.

    Attributes:
        weight_bits: Bits of a weight.
        input_bits: Bits of what it multiplies.
        per_channel: Whether weights have a scale for each output channel, or one for all.
    """

    weight_bits: int = 8
    input_bits: int = 8
    per_channel: bool = True


@contextmanager
def fake_quantized(
    tower: nn.Module, calibrate: Callable[[], object], rounding: Rounding | None = None
) -> Iterator[list[str]]:
    """Round the products of a tower within the body, in training and without; yield their names.

    Afterwards the tower is as it was but for what was trained.

    Args:
        tower: Its convolutions and linear layers are rounded.
        calibrate: Runs the tower on samples, which the ranges of inputs are found on, by the largest value.
        rounding: How; INT8 as the files have it by default.
    """
    rounding = rounding or Rounding()
    layers = {
        name: module for name, module in tower.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    of_inputs, hooks = [], []
    for layer in layers.values():
        of_input = _of_inputs(rounding.input_bits)
        of_inputs.append(of_input)
        hooks.append(layer.register_forward_pre_hook(_rounded(of_input)))
        parametrize.register_parametrization(layer, "weight", _of_weights(rounding), unsafe=True)
    try:
        for of_input in of_inputs:
            of_input.disable_fake_quant()
        with torch.no_grad():
            calibrate()
        for of_input in of_inputs:
            of_input.enable_fake_quant()
            of_input.disable_observer()
        yield list(layers)
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _rounded(quantizer: Any) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _, inputs: (quantizer(inputs[0]), *inputs[1:])


def _of_inputs(bits: int) -> Any:
    from torch.ao.quantization import FakeQuantize, MinMaxObserver

    top, made = (1 << (bits - 1)) - 1, cast("Any", FakeQuantize)  # torch leaves it untyped
    return made(
        observer=MinMaxObserver,
        quant_min=-top,
        quant_max=top,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )


def _of_weights(rounding: Rounding) -> Any:
    """Return a quantizer whose range is that of the weights as they are in each step."""
    from torch.ao.quantization import (
        FakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )

    top, made = (1 << (rounding.weight_bits - 1)) - 1, cast("Any", FakeQuantize)
    shared = {"quant_min": -top, "quant_max": top, "dtype": torch.qint8, "averaging_constant": 1.0}
    if rounding.per_channel:
        return made(
            observer=MovingAveragePerChannelMinMaxObserver,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            **shared,
        )
    return made(observer=MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric, **shared)
