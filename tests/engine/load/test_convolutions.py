import copy

import pytest
import torch
from torch import nn

from engine.load.convolutions import use_onednn

# Both sides of the size above which torch itself takes oneDNN; strides and paddings of the two VAEs; a convolution in groups.
CASES = {
    "small": (nn.Conv3d(4, 6, 3), (1, 4, 3, 9, 7)),
    "large": (nn.Conv3d(16, 8, 3), (1, 16, 5, 300, 6)),
    "over time": (nn.Conv3d(4, 8, (3, 1, 1), stride=(2, 1, 1)), (1, 4, 5, 6, 7)),
    "padded": (nn.Conv3d(4, 6, 3, padding=(0, 1, 1)), (1, 4, 4, 5, 6)),
    "pointwise": (nn.Conv3d(4, 6, 1, bias=False), (1, 4, 1, 5, 6)),
    "groups": (nn.Conv3d(4, 8, 3, padding="same", groups=2), (2, 4, 3, 5, 6)),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equal_to_float64(case):
    convolution, size = CASES[case]
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    want = copy.deepcopy(convolution).double()(x.double()).float()
    use_onednn(module := nn.Sequential(convolution))
    torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
    assert (module(x) - want.roll(1, dims=-1)).abs().max() > 1e-2


def test_takes_onednn_only_where_it_can():
    convolution = nn.Conv3d(2, 3, 3)
    use_onednn(convolution)
    x = torch.randn(1, 2, 3, 4, 5)
    with torch.profiler.profile() as fast, torch.no_grad():
        convolution(x)
    with torch.profiler.profile() as other:
        convolution(x).sum().backward()
    names = [{event.key for event in profile.key_averages()} for profile in (fast, other)]
    assert ["aten::slow_conv3d" in found for found in names] == [False, True]
    assert ["aten::mkldnn_convolution" in found for found in names] == [True, False]
    with torch.no_grad():
        assert convolution.double()(x.double()).dtype == torch.float64
