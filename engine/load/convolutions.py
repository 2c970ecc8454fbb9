"""Run 3D convolutions on a CPU with oneDNN."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def use_onednn(module: nn.Module) -> None:
    """Make every Conv3d of a module use oneDNN's kernel on a CPU in float32, for inference only.

    torch uses oneDNN for a batch of one only above 20,480 elements of batch x channels x frames x height, and otherwise a loop
    that takes 3 to 7 times as long; a streamed decode has such sizes. Sums are in another order, so frames differ by rounding
    (2e-6 of 1 for the embedded VAE).
    """
    if not torch.backends.mkldnn.is_available():
        return
    for convolution in module.modules():
        if not isinstance(convolution, nn.Conv3d):
            continue
        if convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str):
            convolution._conv_forward = partial(_convolve, convolution, convolution._conv_forward)  # type: ignore[method-assign]


def _convolve(
    module: nn.Conv3d, otherwise: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return otherwise(x, weight, bias)
    assert not isinstance(module.padding, str), "use_onednn leaves such a module alone"
    return torch.mkldnn_convolution(x, weight, bias, module.padding, module.stride, module.dilation, module.groups)
