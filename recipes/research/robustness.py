"""What saved students of `study.py` lose on blurred, noisy and low-pass test images: nothing is trained.

python recipes/research/robustness.py --pairs mixer:resnet_slim --methods ce kd uhkd sfkd

Students are those that `study.py final` saves, of the first seed. A line a student goes to the output file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from jobs import CLASSES, PAIRS, PIXELS
from kornia.filters import gaussian_blur2d
from study import load_split, student_path
from torch import Tensor

from hetkd import Distiller
from hetkd.models import build_small, load_weights
from hetkd.training.records import git_revision, machine

METHODS = ("ce", "kd", "uhkd", "sfkd")
PART = 500


def low_pass(images: Tensor, cycles: int) -> Tensor:
    """Keep the frequencies of images ``[B, C, H, W]`` in [0, 1] up to so many cycles a side and axis."""
    spectrum = torch.fft.fft2(images)
    rows, columns = (torch.fft.fftfreq(side, 1 / side).abs() <= cycles for side in images.shape[-2:])
    return torch.fft.ifft2(spectrum * torch.outer(rows, columns)).real.clamp(0, 1)


def noise(images: Tensor, deviation: float) -> Tensor:
    """Add the same Gaussian noise to images in [0, 1] at every call."""
    generator = torch.Generator().manual_seed(0)
    return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Tensor, deviation: float) -> Tensor:
    """Blur images by a Gaussian of so many pixels."""
    size = 2 * round(3 * deviation) + 1
    return gaussian_blur2d(images, (size, size), (deviation, deviation))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "clean": lambda x: x,
    "noise 0.05": lambda x: noise(x, 0.05),
    "noise 0.1": lambda x: noise(x, 0.1),
    "blur 0.7 px": lambda x: blur(x, 0.7),
    "blur 1 px": lambda x: blur(x, 1.0),
    "low-pass 8": lambda x: low_pass(x, 8),
    "low-pass 5": lambda x: low_pass(x, 5),
}


def main(words: list[str] | None = None) -> None:
    """Test each student on each kind of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS, metavar="PAIR")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME")
    parser.add_argument("--students", type=Path, default=Path("runs/students"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("docs/research/lines/robustness.jsonl"), metavar="FILE")
    arguments = parser.parse_args(words)
    for pair in arguments.pairs:
        for method in arguments.methods:
            top1 = test_student(pair, student_path(arguments.students, pair, method))
            row = {"pair": pair, "method": method, "top1": top1, "git_revision": git_revision(), "machine": machine()}
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(pair, method, *(f"{change} {value:.2f}" for change, value in top1.items()), sep="  ", flush=True)


@torch.no_grad()
def test_student(pair: str, path: Path) -> dict[str, float]:
    """Return the top-1 of a saved student in percent, by kind of test images."""
    name = pair.split(":")[1]
    student, size = build_small(name, PIXELS[name], CLASSES, 3)
    load_weights(student, path)
    distiller = Distiller(None, student, "ce", input_size=size).eval()
    images, labels = load_split().test
    right = dict.fromkeys(CHANGES, 0)
    for part, of_part in zip(images.split(PART), labels.split(PART), strict=True):
        for change, apply in CHANGES.items():
            found = distiller.predict(apply(part.float() / 255)).argmax(1)
            right[change] += int((found == of_part).sum())
    return {change: 100 * count / len(labels) for change, count in right.items()}


if __name__ == "__main__":
    main()
