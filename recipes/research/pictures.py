"""Draw one picture per method, of what it compares, into `docs/methods/images`.

    python recipes/research/pictures.py

`PICTURES` says what to draw; weights are the defaults of the methods, and `in_words` gives the alternative texts.
"""

import argparse
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from hetkd.methods.common.method import methods

FOLDER = Path(__file__).parents[2] / "docs" / "methods" / "images"
FONT = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
WIDTH, MARGIN, COLUMN = 440, 14, 196  # pixels
SIZE, LINE, PADDING, ARROW = 15, 19, 8, 18
COLUMN_CHARACTERS, ROW_CHARACTERS, TERM_CHARACTERS = 21, 42, 38
INK, EDGE = "#1f2933", "#8a94a3"
FILLS = {"plain": "#ffffff", "teacher": "#dbe7fb", "student": "#fde6cf", "compared": "#d9f0e1"}


@dataclass(frozen=True)
class Picture:
    """What is drawn of a method; options in braces stand for their defaults.

    Attributes:
        teacher: The steps from the teacher's output to what is compared. ``*`` before a step marks learnt parameters,
            ``?`` a step that is off by default.
        student: The same of the student; ``None`` for the same steps.
        compared: How both sides are compared.
        features: The term with the weight ``feature_weight``, if there is one.
        logits: The term with the weight ``kd_weight``, left out where that is 0.
        title: Head of the teacher's column.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...] | None
    compared: str
    features: str = ""
    logits: str = "KL divergence of logits, T = {temperature:g}"
    title: str = "Teacher, frozen"

    @property
    def paths(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The steps of teacher and student."""
        return self.teacher, self.teacher if self.student is None else self.student


VECTOR = "vector before the classifier"
MAPS = "maps of up to four stages"
EARLY = "maps of up to three stages, not the last"
PICTURES = {
    "sfkd": Picture(
        (EARLY, "fixed map to D channels", "K x K lowest waves on a common grid"),
        (
            EARLY,
            "*learnt 1 x 1 convolution to D channels",
            "?DS2S on wavelet sub-bands, off by default",
            "K x K lowest waves on a common grid",
        ),
        "GFFL: correlation of each coefficient over the batch; a Gaussian window weighs low waves most",
        "GFFL, mean over the stages",
    ),
    "uhkd": Picture(
        (EARLY, "fixed map to D channels", "FTM: K x K lowest waves on a common grid, standardised over the batch"),
        (
            EARLY,
            "*FAM: learnt 1 x 1 convolution to D channels",
            "K x K lowest waves on a common grid, standardised over the batch",
        ),
        "squared error of all coefficients",
        "squared error, mean over the stages",
    ),
    "rsd": Picture(
        (VECTOR, "standardised over the batch"),
        (VECTOR, "*learnt projector: linear, batch norm, GELU, linear", "standardised over the batch"),
        "cross-correlation matrix, which approaches the identity",
        "distance from the identity",
    ),
    "ofa": Picture(
        ("logits",),
        (MAPS, "*learnt exits, one per stage", "logits of each exit"),
        "cross-entropy with the teacher's probabilities, target class enhanced",
        "the losses of the exits, summed",
        "the same loss on the final logits",
    ),
    "crd": Picture(
        (VECTOR, "*learnt linear map to a unit vector"),
        None,
        "contrast: same image against other images of the batch and of a memory of {negatives:,}",
        "contrast of both sides",
    ),
    "rkd": Picture(
        (VECTOR, "distances and angles between the images of a batch"),
        None,
        "Huber loss between relations",
        "({distance_weight:g} x distances + {angle_weight:g} x angles)",
    ),
    "cc": Picture(
        (VECTOR, "*learnt linear map to {width} numbers"),
        None,
        "error of each image, multiplied by that of its neighbour in the batch",
        "products of neighbouring errors",
    ),
    "at": Picture(
        (MAPS, "attention: mean square over the channels, divided by its length"),
        None,
        "squared error of attention, pixel by pixel",
        "squared error, summed over the stages",
    ),
    "fitnet": Picture(
        (MAPS, "common grid"),
        (MAPS, "common grid", "*learnt 1 x 1 convolution to the teacher's channels"),
        "squared error of maps, pixel by pixel",
        "squared error, summed over the stages",
    ),
    "deit": Picture(
        ("logits", "most likely class"),
        ("logits, of the distillation token if there is one",),
        "cross-entropy with the teacher's class as a label",
        logits="cross-entropy with the teacher's class",
    ),
    "dist": Picture(
        ("logits", "probabilities"),
        None,
        "correlation over the classes of an image, and over the images of a batch",
        logits="1 minus each correlation, summed",
    ),
    "dkd": Picture(
        ("logits", "target class against all others; the others among themselves"),
        None,
        "KL divergence of both parts: TCKD and NCKD",
        logits="({alpha:g} x TCKD + {beta:g} x NCKD), T = {temperature:g}",
    ),
    "cwd": Picture(
        ("logits of each pixel", "for each class a distribution over the pixels, at temperature T"),
        None,
        "KL divergence of each class",
        logits="channel-wise KL divergence, T = {temperature:g}",
    ),
    "kd": Picture(("logits", "probabilities at temperature T"), None, "KL divergence"),
    "ce": Picture((), ("logits",), "cross-entropy with the labels", title="No teacher is run"),
}


def main(words: list[str] | None = None) -> None:
    """Draw all pictures; ``words`` stand for the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR")
    output = parser.parse_args(words).output
    for name in PICTURES:
        (output / f"{name}.svg").write_text(draw(name), encoding="utf-8")


def in_words(name: str) -> str:
    """Return what the picture of a method shows, as an alternative text."""
    picture = PICTURES[name]
    teacher, student = (", then ".join(step.lstrip("*?") for step in side) for side in picture.paths)
    loss = " plus ".join(f"{weight} x {words}" for weight, words in terms(name))
    parts = [f"{picture.title}: {teacher}" if teacher else picture.title, f"Student, trained: {student}"]
    return _filled(name, ". ".join([*parts, f"Compared: {picture.compared}", f"Loss: {loss}."]))


def terms(name: str) -> list[tuple[str, str]]:
    """Return the terms of the loss of a method with its defaults: weights, and what they weigh."""
    picture, options = PICTURES[name], _defaults(name)
    found = {"ce": "cross-entropy with the labels", "kd": picture.logits, "feature": picture.features}
    weights = {key: options.get(f"{key}_weight", 0) for key in found}
    return [(f"{weights[key]:g}", _filled(name, words)) for key, words in found.items() if weights[key]]


def draw(name: str) -> str:
    """Return the picture of a method as SVG: both paths, what is compared, and the terms of the loss."""
    picture, whole = PICTURES[name], WIDTH - 2 * MARGIN
    top = MARGIN + _height(1)
    parts = [_box(MARGIN, MARGIN, whole, _height(1), ["images"], "plain")]
    wrapped = [
        [textwrap.wrap(_filled(name, step.lstrip("*?")), COLUMN_CHARACTERS) for step in path] for path in picture.paths
    ]
    heights = [_height(max(map(len, row))) for row in zip_longest(*wrapped, fillvalue=())]
    compared = top + sum(height + ARROW for height in [_height(1), *heights]) + ARROW
    heads = ((picture.title, "teacher", MARGIN), ("Student, trained", "student", WIDTH - MARGIN - COLUMN))
    for (title, fill, x), steps, lines in zip(heads, picture.paths, wrapped, strict=True):
        y, centre = top + ARROW, x + COLUMN / 2
        parts += [_arrow(centre, top, y)] if steps else []
        parts.append(_box(x, y, COLUMN, _height(1), [title], fill, "bold"))
        y += _height(1)
        for step, words, height in zip(steps, lines, heights[: len(steps)], strict=True):
            parts.append(_arrow(centre, y, y + ARROW))
            kind = "student" if step.startswith("*") else "plain"
            parts.append(_box(x, y + ARROW, COLUMN, height, words, kind, "dashed" if step.startswith("?") else ""))
            y += ARROW + height
        parts += [_arrow(centre, y, compared)] if steps else []
    words = textwrap.wrap(_filled(name, picture.compared), ROW_CHARACTERS)
    parts.append(_box(MARGIN, compared, whole, _height(len(words)), words, "compared"))
    y = compared + _height(len(words)) + LINE + PADDING
    parts.append(_text(MARGIN, y, "Loss, with the default weights:", "start", bold=True))
    for index, (weight, term) in enumerate(terms(name)):
        y += PADDING / 2
        parts.append(_text(MARGIN + 72, y + LINE, f"{'+ ' if index else ''}{weight} \u00d7", "end"))
        for line in textwrap.wrap(term, TERM_CHARACTERS):
            y += LINE
            parts.append(_text(MARGIN + 80, y, line, "start"))
    return _page(name, y + MARGIN, parts)


def _page(name: str, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{1.2 * WIDTH:g}" height="{1.2 * height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" font-size="{SIZE}" fill="{INK}">'
    words = f"<title>{methods[name].__name__}</title>\n<desc>{escape(in_words(name))}</desc>"
    card = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="10" fill="#fbfcfd" stroke="{EDGE}"/>'
    return "\n".join([head, words, card, *parts, "</svg>\n"])


def _box(x: float, y: float, width: float, height: float, lines: Sequence[str], fill: str, style: str = "") -> str:
    first = y + height / 2 - LINE * (len(lines) - 1) / 2 + 0.35 * SIZE
    dashes = ' stroke-dasharray="5 4"' if style == "dashed" else ""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
    texts = [
        _text(x + width / 2, first + LINE * index, line, "middle", style == "bold") for index, line in enumerate(lines)
    ]
    return "\n".join([f'<rect {place} fill="{FILLS[fill]}" stroke="{EDGE}"{dashes}/>', *texts])


def _text(x: float, y: float, words: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def _arrow(x: float, start: float, end: float) -> str:
    head = f"M{x - 4:g} {end - 6:g} L{x:g} {end - 1:g} L{x + 4:g} {end - 6:g}"
    return f'<path d="M{x:g} {start:g} V{end - 1:g} {head}" fill="none" stroke="{INK}" stroke-width="1.5"/>'


def _height(lines: int) -> float:
    return LINE * lines + 2 * PADDING


def _filled(name: str, words: str) -> str:
    return words.format(**_defaults(name)).replace(" x ", " \u00d7 ")


def _defaults(name: str) -> dict[str, Any]:
    return {option.name: option.default for option in inspect.signature(methods[name]).parameters.values()}


if __name__ == "__main__":
    main()
