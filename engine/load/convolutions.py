"""Convolutions over time and space on a CPU, by the kernel that is fast for them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def use_onednn(module: nn.Module) -> None:
    """Let every Conv3d of a module take oneDNN's kernel wherever it is on a CPU in float32, for inference only.

    torch gives a batch of one to oneDNN only above 20,480 elements of batch x channels x frames x height, and else to a loop of
    its own, which takes 3 to 7 times as long: a streamed decode works on such sizes. The sums are in another order, so frames
    differ from those of torch's loop by rounding (2e-6 of 1 for the embedded VAE).
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
