"""Pictures from files, upright and in 8 bits; errors have a path."""

import traceback
from bisect import bisect_right
from pathlib import Path
from typing import Any

from torch import Tensor

BACKGROUND = (255, 255, 255)
_DEEP = 65_535


class UnfitPixels(ValueError):
    """Pixels are deeper than 8 bits, and out of the range that they should have."""


class UnreadableImage(OSError):
    """An image file is damaged, or holds no picture; the message has its path."""


def open_picture(path: str | Path) -> Any:
    """Open an image file as a PIL image with all its pixels loaded.

    Raises:
        UnreadableImage: If its content is damaged.
        OSError: If the file cannot be read at all: no such file, no permission, a disk that is gone.
    """
    from PIL import Image

    with open(path, "rb") as file:
        try:
            image = Image.open(file)
            image.load()
        except Exception as error:
            raise_for_content(str(path), error)
    return image


def raise_for_content(name: str, error: Exception) -> Any:
    """Raise `UnreadableImage` with the name of an image if the error is of its content, else the error itself."""
    if isinstance(error, UnreadableImage):
        raise error
    if is_of_content(error):
        raise UnreadableImage(f"{name} cannot be read ({error})") from error
    raise error


def check_is_picture(image: Any, dataset: Any, index: int) -> None:
    """Refuse what a dataset yields as an image, and is none.

    Raises:
        UnreadableImage: If it is ``None``, as OpenCV returns for a file that it cannot read.
        TypeError: If it is neither a PIL image nor a tensor.
    """
    if image is None:
        raise UnreadableImage(f"{name_of(dataset, index)} cannot be read (the dataset yields None)")
    if not (isinstance(image, Tensor) or hasattr(image, "convert")):
        raise TypeError(
            f"{name_of(dataset, index)} is of type {type(image).__name__}: the dataset must yield PIL images, "
            "PIL.Image.open(path), arrays [H, W, C] or tensors [C, H, W]."
        )


def is_of_content(error: Exception) -> bool:
    """Say whether an error is Pillow's about the content of a file, and not the system's about reaching it."""
    from PIL import Image

    if isinstance(error, OSError):
        return error.errno is None
    if isinstance(error, (SyntaxError, Image.DecompressionBombError, UnfitPixels)):
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).startswith("PIL.")


def is_transparent(image: Any) -> bool:
    """Say whether a PIL image has transparent pixels or may have."""
    return bool(image.has_transparency_data)


def upright_8bit(image: Any, mode: str) -> Any:
    """Turn a PIL image as its EXIF data say, into ``"RGB"`` or ``"L"`` with 8 bits, on white where it is transparent.

    Deeper pixels are scaled by their range: 16 bits from 0 to 65535, floats from 0 to 1.

    Raises:
        UnfitPixels: If deeper pixels are out of these ranges.

    Example:
        >>> from PIL import Image
        >>> upright_8bit(Image.new("I;16", (1, 1), 65535 // 2), "L").getpixel((0, 0))
        127
    """
    from PIL import ExifTags, Image, ImageOps

    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would copy all pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _scaled(image)
    if is_transparent(image):
        image = image.convert("RGBA")
        laid = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(laid, image)
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Any) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image).astype(np.float64)
    low, high, most = pixels.min(), pixels.max(), 1.0 if image.mode == "F" else float(_DEEP)
    if not (low >= 0 and high <= most):
        raise UnfitPixels(
            f"its pixels ({image.mode}) reach from {low:.4g} to {high:.4g}: scale them to 0 to {most:g} first"
        )
    return Image.fromarray((pixels * (255 / most)).astype(np.uint8))


def name_of(dataset: Any, index: int) -> str:
    """Return the path of an image where a dataset knows it, also within subsets and sums of sets; else its index."""
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        return name_of(dataset.dataset, int(dataset.indices[index]))
    if hasattr(dataset, "cumulative_sizes") and hasattr(dataset, "datasets"):
        part = bisect_right(dataset.cumulative_sizes, index)
        return name_of(dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0))
    samples = getattr(dataset, "samples", None) or getattr(dataset, "imgs", None) or getattr(dataset, "paths", None)
    if not isinstance(samples, (list, tuple)) or index >= len(samples):
        return f"image {index}"
    return str(samples[index][0] if isinstance(samples[index], tuple) else samples[index])
