"""Shared by all transforms: float32 inside, autocast off, float64 kept; and separable products."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Make a function of a tensor compute in float32 (float64 stays) whatever autocast says."""

    @wraps(function)
    def wrapper(x: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(x.device.type, enabled=False):
            return function(at_least_float32(x), *args, **kwargs)

    return wrapper


def constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Do what ``torch.compiler.assume_constant_result`` does, which would import the whole compiler: 1.3 seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or as it is if it is float64.

    Raises:
        TypeError: If ``x`` is not a real floating-point tensor.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected a real floating-point tensor, got dtype {x.dtype}.")
    return x if x.dtype == torch.float64 else x.float()


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute ``rows @ x @ columns.T`` for maps ``[..., h, w]``.

    As two products with all maps at once, which is several times faster than one small product a map.

    Args:
        x: ``[..., h, w]``.
        rows: ``[m, h]``.
        columns: ``[n, w]``.

    Returns:
        ``[..., m, n]``.
    """
    return ((x @ columns.T).transpose(-1, -2) @ rows.T).transpose(-1, -2)
