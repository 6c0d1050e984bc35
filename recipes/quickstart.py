"""The main job in one command: a vision transformer teaches a small CNN on real images.

    python recipes/quickstart.py                  # at most 5 minutes on two cores
    python recipes/quickstart.py --seeds 3        # mean and spread over three seeds

A ViT trained on Fashion-MNIST teaches a small timm CNN that sees 5,000 of its images. The same
student is trained alone, with KD, with UHKD and with SFKD, under one budget and the same seeds.

Data and teacher are in `assets/` beside this script. Copied out without them, it downloads Fashion-MNIST and trains the
teacher first, in a few minutes.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import kornia.augmentation as K
import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hetkd import Distiller, list_methods, load_model
from hetkd.data import ImageData, load_images
from hetkd.models import build_small, load_weights

PIXELS, CLASSES = 56, 10
ASSETS = Path(__file__).parent / "assets"
TRAIN_IMAGES, TEST_IMAGES = 5_000, 2_000  # as in the assets
COMPARED = {"ce": "alone", "kd": "KD", "uhkd": "UHKD", "sfkd": "SFKD"}
COLOURS = ("#8a8f98", "#2f6fde", "#e0862a", "#1c9a5b", "#b23a8e")
_SIZE, _SCALE = (900, 560), 2  # drawn at twice the size and scaled down, which smooths the lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 150, 84, 70
console = Console(highlight=False, soft_wrap=True)
Data = tuple[Tensor, Tensor]


def main() -> None:
    """Train, compare, save, load again."""
    arguments = parse_arguments()
    start = time.perf_counter()
    data, output = load_data(), arguments.output
    train, test = (tuple(x[: arguments.images] for x in split) for split in (data.train, data.test))
    output.mkdir(parents=True, exist_ok=True)
    teacher = make_teacher(data, arguments.teacher_epochs)
    console.print(f"Fashion-MNIST: {len(train[0]):,} training and {len(test[0]):,} test images of 28 x 28 pixels\n")

    methods = dict.fromkeys([*COMPARED, arguments.method])
    runs: dict[str, list[list[float]]] = {method: [] for method in methods}
    first: dict[str, Distiller] = {}
    for seed in range(arguments.seeds):
        for method in methods:
            distiller = make_distiller(teacher, arguments.student, method, seed)
            if seed == 0:
                console.print(f"{distiller.plan}\n" if method == arguments.method else f"{distiller.plan.title}")
            runs[method].append(train_student(distiller, train, test, arguments.epochs, seed))
            first.setdefault(method, distiller)
    saved = first[arguments.method]

    print_accuracies(runs, evaluate_teacher(teacher, test))
    print_models(teacher, saved.student)
    path = output / "student.safetensors"
    saved.save_student(path)
    accuracy = accuracy_in_plain_timm(arguments.student, path, test)
    console.print(f"\nstudent trained with {arguments.method}: {path}; loaded again in plain timm: {accuracy:.2f} %")
    picture = output / "learning_curves.png"
    means = {label(method): [statistics.mean(epoch) for epoch in zip(*runs[method], strict=True)] for method in runs}
    draw_curves(means, f"{arguments.student} taught by a ViT", "test top-1, %", picture)
    console.print(f"learning curves: {picture}")
    if all(find_spec(package) for package in ("jinja2", "matplotlib")):  # the extra "report"
        console.print(f"report: {saved.report(test, output / 'report.html', baseline=first['ce'])}")
    console.print(f"whole run: {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method", default="sfkd", choices=list_methods("classification"), help="method of the student that is saved"
    )
    parser.add_argument("--student", default="mobilenetv3_small_050", help="any timm model that takes one channel")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, help="of each split, instead of all")
    parser.add_argument("--seeds", type=int, default=1, help="runs a method; more than one give mean and spread")
    parser.add_argument("--teacher-epochs", type=int, default=10, help="of the teacher, if it is not in assets/")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), metavar="DIR")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    return arguments


def load_data() -> ImageData:
    """Return the images beside this script, or as many of the whole set."""
    if (ASSETS / "fashion_mnist").is_dir():
        return load_images(str(ASSETS / "fashion_mnist"))
    whole = load_images("fashion-mnist")
    test = (whole.test[0][:TEST_IMAGES], whole.test[1][:TEST_IMAGES])
    return ImageData(whole.name, whole.first(TRAIN_IMAGES).train, test, whole.classes)


def make_teacher(data: ImageData, epochs: int) -> nn.Module:
    """Return the teacher beside this script, or train one on the whole set."""
    teacher, size = build_small("vit", data.pixels, CLASSES, data.channels)
    weights = ASSETS / "vit_fashion_mnist.safetensors"
    if weights.exists():
        load_weights(teacher, weights)
    else:
        console.print(f"training the teacher for {epochs} epochs")
        flip = K.RandomHorizontalFlip(p=0.5)
        alone = Distiller(None, teacher, "ce", input_size=size)
        alone.fit(load_images("fashion-mnist").train, epochs=epochs, lr=2e-3, warmup_epochs=1, augment=flip)
    return teacher.eval()


def make_distiller(teacher: nn.Module, student: str, method: str, seed: int) -> Distiller:
    """Build the same student, with the same initial weights, for every method."""
    torch.manual_seed(seed)
    model = load_model(student, pretrained=False, num_classes=CLASSES, in_chans=1)
    return Distiller(teacher, model, method, input_size=PIXELS)


def train_student(distiller: Distiller, train: Data, test: Data, epochs: int, seed: int) -> list[float]:
    """Train under the one budget of this recipe and return the test accuracy after each epoch."""
    result = distiller.fit(
        train,
        test,
        epochs=epochs,
        batch_size=64,
        lr=2e-3,
        warmup_epochs=0.5,
        augment=K.RandomHorizontalFlip(p=0.5),
        seed=seed,
    )
    return [record["top1"] for record in result.history]


def label(method: str) -> str:
    """Return a method's name in the table."""
    return COMPARED.get(method, method)


def evaluate_teacher(teacher: nn.Module, test: Data) -> float:
    """Return the teacher's accuracy on the same test images."""
    return Distiller(None, teacher, method="ce").evaluate(test)["top1"]


def print_accuracies(runs: dict[str, list[list[float]]], teacher: float) -> None:
    """Print accuracy after the last epoch, and the gain over the student alone, paired by seed."""
    table = Table(title="\ntest top-1 after the last epoch, %", title_justify="left")
    for column in ("method", "mean", "spread", "gain over alone", "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    alone = [run[-1] for run in runs["ce"]]
    for method, curves in runs.items():
        last = [run[-1] for run in curves]
        gain = statistics.mean(a - b for a, b in zip(last, alone, strict=True))
        spread = f"{statistics.stdev(last):.2f}" if len(last) > 1 else "-"
        row = [label(method), f"{statistics.mean(last):.2f}", spread, f"{gain:+.2f}", str(len(last))]
        table.add_row(*row)
    table.add_section()
    table.add_row("teacher", f"{teacher:.2f}", "", "", "")
    console.print(table)
    behind = [label(m) for m in runs if m != "ce" and statistics.mean(r[-1] for r in runs[m]) <= statistics.mean(alone)]
    if behind:
        console.print(f"No gain here over the student alone: {', '.join(behind)}.")


def print_models(teacher: nn.Module, student: nn.Module) -> None:
    """Print sizes and speeds of both models."""
    table = Table(title="\nmodels", title_justify="left")
    for column in ("model", "parameters", "input", "images/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model, pixels in (("teacher", teacher, 28), ("student", student, PIXELS)):
        parameters = sum(p.numel() for p in model.parameters())
        table.add_row(name, f"{parameters / 1e6:.2f} M", f"{pixels} x {pixels}", f"{speed(model, pixels):,.0f}")
    console.print(table)


def speed(model: nn.Module, pixels: int, batch: int = 128, repeats: int = 5) -> float:
    """Return images a second in inference on the CPU: the median of a few batches."""
    images = torch.rand(batch, 1, pixels, pixels)
    model = model.cpu().eval()
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(images)
            seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[1:])


def draw_curves(curves: Mapping[str, Sequence[float]], title: str, y_label: str, path: Path) -> None:
    """Draw one line a curve over epochs 1, 2, ... and write a PNG.

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


def accuracy_in_plain_timm(name: str, path: Path, test: Data) -> float:
    """Evaluate the saved student with nothing but timm and torch, as a deployment would."""
    model = timm.create_model(name, num_classes=CLASSES, in_chans=1, checkpoint_path=str(path)).eval()
    mean, std = (statistics.mean(model.pretrained_cfg[key]) for key in ("mean", "std"))
    images = nn.functional.interpolate(
        test[0].float() / 255, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False, antialias=True
    )
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in ((images - mean) / std).split(250)])
    return 100 * (logits.argmax(1) == test[1]).float().mean().item()


if __name__ == "__main__":
    main()
