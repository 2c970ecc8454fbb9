"""Functions that a compiled block calls as one operator.

A compiler unrolls a loop over pieces of a tensor and keeps all intermediate results, which defeats the loop's purpose. An operator
runs as in eager mode.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

Given = ParamSpec("Given")


def like_first(first: Tensor, *_others: Any, **_settings: Any) -> Tensor:
    """The shape of a result that has the shape and dtype of the first argument."""
    return first.new_empty(first.shape)


def one_operator(
    schema: str, shape: Callable[..., Tensor]
) -> Callable[[Callable[Given, Tensor]], Callable[Given, Tensor]]:
    """Register a function as one operator, `freespec::NAME`, for compiled blocks; elsewhere it is called directly.

    The function changes no argument and returns a new tensor. `schema` is its signature in torch's words; `shape` is called with the
    same arguments and returns an empty, contiguous tensor like the result.
    """

    def decorate(function: Callable[Given, Tensor]) -> Callable[Given, Tensor]:
        def contiguous(*args: Given.args, **kwargs: Given.kwargs) -> Tensor:
            return function(*args, **kwargs).contiguous()

        operator = torch.library.custom_op(f"freespec::{function.__name__}", contiguous, mutates_args=(), schema=schema)
        operator.register_fake(shape)

        @functools.wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Tensor:
            return operator(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

        return call

    return decorate
