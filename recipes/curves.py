"""Learning curves as a picture, drawn with Pillow, so that the quickstart needs nothing beyond hetkd itself."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#8a8f98", "#2f6fde", "#e0862a", "#1c9a5b", "#b23a8e")
_SIZE, _SCALE = (900, 560), 2  # drawn at twice the size and scaled down, which smooths the lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 150, 84, 70


def draw_curves(curves: Mapping[str, Sequence[float]], title: str, y_label: str, path: Path) -> None:
    """Draws one line a curve over epochs 1, 2, ... and writes a PNG.

    Args:
        curves: Values by name, one an epoch.
        title: Above the picture.
        y_label: What the values are.
        path: Where the picture goes.
    """
    image = Image.new("RGB", (_SIZE[0] * _SCALE, _SIZE[1] * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    values = [value for curve in curves.values() for value in curve]
    low, high = math.floor(min(values)), math.ceil(max(values) + 1e-9)
    epochs = max(len(curve) for curve in curves.values())

    def x(epoch: float) -> float:
        return (_LEFT + (_SIZE[0] - _LEFT - _RIGHT) * (epoch - 1) / max(1, epochs - 1)) * _SCALE

    def y(value: float) -> float:
        return (_SIZE[1] - _BOTTOM - (_SIZE[1] - _TOP - _BOTTOM) * (value - low) / max(1, high - low)) * _SCALE

    def text(position: tuple[float, float], words: str, size: int, anchor: str, colour: str = "#333333") -> None:
        draw.text(position, words, fill=colour, font=ImageFont.load_default(size * _SCALE), anchor=anchor)

    for tick in range(low, high + 1, max(1, round((high - low) / 8))):
        draw.line([(x(1), y(tick)), (x(epochs), y(tick))], fill="#e4e6ea", width=_SCALE)
        text((x(1) - 10 * _SCALE, y(tick)), f"{tick}", 14, "rm")
    for epoch in range(1, epochs + 1, max(1, round(epochs / 10))):
        text((x(epoch), y(low) + 10 * _SCALE), f"{epoch}", 14, "ma")
    text((x(1), 18 * _SCALE), title, 18, "la")
    text((x(1) - 10 * _SCALE, 44 * _SCALE), y_label, 14, "la", "#777777")
    text(((x(1) + x(epochs)) / 2, y(low) + 36 * _SCALE), "epoch", 14, "ma", "#777777")

    label_height = 20 * _SCALE
    free_above = math.inf
    ends = sorted(curves, key=lambda name: -y(curves[name][-1]))
    colours = dict(zip(curves, COLOURS * len(curves), strict=False))
    for name in ends:
        points = [(x(epoch), y(value)) for epoch, value in enumerate(curves[name], start=1)]
        draw.line(points, fill=colours[name], width=3 * _SCALE, joint="curve")
        for px, py in points:
            draw.ellipse([px - 4 * _SCALE, py - 4 * _SCALE, px + 4 * _SCALE, py + 4 * _SCALE], fill=colours[name])
        label_y = min(points[-1][1], free_above - label_height)
        free_above = label_y
        text((points[-1][0] + 14 * _SCALE, label_y), f"{name}  {curves[name][-1]:.1f}", 15, "lm", colours[name])
    image.resize(_SIZE, Image.Resampling.LANCZOS).save(path)
