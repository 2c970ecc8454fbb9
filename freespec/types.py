"""torch's types for annotations in modules that must not import torch: methods are settings too, which are read without it.

The block below stands here and not in those modules because a parser of settings runs such blocks of theirs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device  # noqa: N812
else:
    Tensor = Device = Any
