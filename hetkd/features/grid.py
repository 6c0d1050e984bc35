"""Spatial grids: tokens to feature maps, and maps of different models to one common grid."""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hetkd.spectral.precision import constant_when_compiled, separable


def tokens_to_map(
    tokens: Tensor, image_size: tuple[int, int], patch_size: int | tuple[int, int] | None = None
) -> Tensor:
    """Arrange a token sequence as a feature map, without its prefix tokens.

    Class, register and distillation tokens stand before the patch tokens in every model that is tapped this way;
    whatever exceeds the patch grid is dropped from the front.

    Args:
        tokens: ``[B, N, C]``.
        image_size: Height and width in pixels of the images that the model saw.
        patch_size: Pixels a token covers; ``None`` finds the grid from N and the aspect ratio of the image, with as few
            prefix tokens as possible.

    Returns:
        ``[B, C, h, w]``, with h * w <= N.

    Raises:
        ValueError: If no grid of the image's aspect ratio fits N tokens.

    Example:
        >>> tokens_to_map(torch.rand(2, 1 + 49, 16), image_size=(224, 224)).shape  # one class token
        torch.Size([2, 16, 7, 7])
    """
    count = tokens.shape[1]
    height, width = _token_grid(count, image_size, patch_size)
    patches = tokens[:, count - height * width :]
    return patches.transpose(1, 2).unflatten(2, (height, width))


def windows_to_map(tokens: Tensor, batch: int, image_size: tuple[int, int]) -> Tensor:
    """Put windows of tokens, as detection backbones keep them in the batch axis, together to feature maps.

    Args:
        tokens: ``[batch * W * W, N, C]``: the windows of an image row by row, each with its own prefix tokens.
        batch: Number of images.
        image_size: Height and width in pixels of the images.

    Returns:
        ``[batch, C, W * h, W * w]`` for windows of h x w patches.

    Raises:
        ValueError: If the windows do not form a square, or N tokens no grid.
    """
    side = math.isqrt(len(tokens) // batch)
    if side * side * batch != len(tokens):
        raise ValueError(f"{len(tokens)} windows do not form squares for {batch} images.")
    windows = tokens_to_map(tokens, image_size).unflatten(0, (batch, side, side))
    return windows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _token_grid(count: int, image_size: tuple[int, int], patch_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if patch_size is not None:
        patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        height, width = image_size[0] // patch_height, image_size[1] // patch_width
        if 0 < height * width <= count:
            return height, width
        raise ValueError(
            f"{count} tokens do not hold the {height} x {width} patches of {patch_height} x {patch_width} pixels "
            f"in an image of {image_size[0]} x {image_size[1]}."
        )
    for height, width in _candidate_grids(count, image_size):
        return height, width
    raise ValueError(f"{count} tokens do not form a grid with the aspect ratio of an image of {image_size}.")


def _candidate_grids(
    count: int, image_size: tuple[int, int], most_prefix_tokens: int = 16
) -> Iterator[tuple[int, int]]:
    aspect = image_size[0] / image_size[1]
    for prefix in range(min(most_prefix_tokens, count - 1) + 1):
        patches = count - prefix
        height = round(math.sqrt(patches * aspect))
        if height and patches % height == 0 and round(height / aspect) == patches // height:
            yield height, patches // height


def to_grid(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample feature maps to a grid: area-like when it shrinks, bilinear when it grows.

    Args:
        x: ``[B, C, h, w]``.
        size: Height and width of the result.

    Returns:
        ``[B, C, *size]``, in the dtype of ``x``; ``x`` itself if it has that size already.

    Example:
        >>> to_grid(torch.ones(1, 3, 14, 14), (7, 7)).shape
        torch.Size([1, 3, 7, 7])
    """
    if x.shape[-2:] == size:
        return x
    rows, columns = (_constant(old, new, x.dtype, x.device) for old, new in zip(x.shape[-2:], size, strict=True))
    return separable(x, rows, columns)


def resampling(old: int, new: int) -> Tensor:
    """Return the matrix ``[new, old]`` (float32) by which `to_grid` resamples an axis; the identity if both agree.

    Example:
        >>> resampling(4, 2)
        tensor([[0.4286, 0.4286, 0.1429, 0.0000],
                [0.0000, 0.1429, 0.4286, 0.4286]])
    """
    return torch.eye(old) if old == new else _resampling_matrix(old, new, torch.float32, torch.device("cpu"))


@constant_when_compiled
def _constant(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _resampling_matrix(old, new, dtype, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor of inference mode could not be used in training later
def _resampling_matrix(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix ``[new, old]`` of the interpolation; applied as such it is three times faster on a CPU."""
    lines = torch.eye(old, dtype=torch.float64)[:, None, None, :]
    resampled = F.interpolate(lines, size=(1, new), mode="bilinear", align_corners=False, antialias=True)
    return resampled[:, 0, 0].T.contiguous().to(device, dtype)


def meeting_grid(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """Return the grid on which two maps meet that are compared pixel by pixel: their own if they agree.

    Example:
        >>> meeting_grid((56, 56), (56, 56)), meeting_grid((14, 14), (56, 56))
        ((56, 56), (14, 14))
    """
    return first if first == second else common_grid(first, second, 1)


def common_grid(first: tuple[int, int], second: tuple[int, int], multiple: int, largest: int = 16) -> tuple[int, int]:
    """Return the grid on which two feature maps meet.

    Per axis it is the coarser of the two native grids (finer detail has no counterpart on the other side), at most
    ``largest``, rounded up to a multiple of ``multiple``.

    Args:
        first: Native height and width of one map.
        second: Native height and width of the other.
        multiple: What the result is a multiple of, 2^J for J wavelet levels.
        largest: Upper limit, before rounding.

    Example:
        >>> common_grid((14, 14), (7, 7), multiple=4)
        (8, 8)
    """
    height, width = (math.ceil(min(a, b, largest) / multiple) * multiple for a, b in zip(first, second, strict=True))
    return height, width
